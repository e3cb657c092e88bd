# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""What does the host tell a captured step? One line of numbers, laid out the same on both sides.

Of each line of the step: its row, the position of its first token (an upper bound where one token runs), and
the row that gets its greatest token inside, or -1 where a token is chosen otherwise or not at all. Steps with
draws have the row that draws inside, or -1. Steps with prompts have more: where each line's tokens begin,
which line each token belongs to, and where attention's tiles begin.
Invariant: -1 is nobody: such a line, token or tile reads and writes nothing.
B lines: R one-token rows, then P longer spans; T tokens of the spans, M tiles.
"""

from __future__ import annotations

import dataclasses
import itertools
import struct
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from slipstream.core.plan import Span
from slipstream.engine.step_shapes import StepShape

# A row's length on the device decides its position; the host need not name a bound.
NO_BOUND = 2**40
NOBODY = -1
# Behind the end of every span.
NOWHERE = 2**30


@dataclasses.dataclass(slots=True)
class Inside:
    """Which rows get their token inside a step, line by line or span by span: a row's number, or -1.

    `leads` take their greatest token, `draws` draw one; `rows` are either's, and `num_top` says of those that
    want logprobs of how many leading tokens. Nothing changes it.
    """

    leads: list[int]
    draws: list[int]
    num_top: dict[int, int] = dataclasses.field(default_factory=dict[int, int])
    rows: list[int] = dataclasses.field(init=False)
    count: int = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self.rows = [max(pair) for pair in zip(self.leads, self.draws, strict=True)]
        self.count = len(self.rows) - self.rows.count(NOBODY)

    @classmethod
    def nobody(cls, count: int) -> Inside:
        return cls([NOBODY] * count, [NOBODY] * count)

    def by_span(self, sample: Sequence[int], spans: Sequence[Span]) -> Inside:
        """Return what this, by sampled row, is by span."""
        place = {row: i for i, row in enumerate(sample)}
        places = [place.get(span.row, NOBODY) for span in spans]
        leads, draws = ([part[i] if i >= 0 else NOBODY for i in places] for part in (self.leads, self.draws))
        return Inside(leads, draws, self.num_top)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Where things stand. A tile takes `tile_queries` queries; with `tiles_rows` one-token rows have one."""

    tile_queries: int
    tiles_rows: bool

    def num_tiles(self, shape: StepShape) -> int:
        """Return how many tiles any step of this shape can need."""
        rows = shape.rows if self.tiles_rows else 0
        # Worst where every span but one ends one token behind a tile.
        return rows + (shape.tokens - shape.prompts) // self.tile_queries + shape.prompts

    def sizes(self, shape: StepShape) -> list[int]:
        """Return the lengths of the parts, in their order."""
        lines = [shape.lines] * (4 if shape.draws else 3)
        if not shape.prompts:
            return lines
        return [*lines, shape.lines + 1, shape.tokens, 2 * self.num_tiles(shape)]

    def pack_rows(self, shape: StepShape, rows: Sequence[int], inside: Inside) -> np.ndarray:
        """Return the line of a step of one-token rows, of which those in `inside` get their token there."""
        host = np.full((len(self.sizes(shape)), shape.lines), NOBODY, dtype=np.int64)
        host[0, : len(rows)] = rows
        host[1] = NO_BOUND
        host[2, : len(rows)] = inside.leads
        if shape.draws:
            host[3, : len(rows)] = inside.draws
        return host.reshape(-1)

    def pack_spans(self, shape: StepShape, spans: Sequence[Span], inside: Inside) -> np.ndarray:
        """Return the line of a step with prompts; `inside` is by span. Without spans it is nobody's step."""
        assert not shape.draws, "a step with prompts has no place for draws"
        # Lists, not arrays: a prompt's few numbers are made when numpy's code has long left the caches.
        num_rows, num_ones = shape.rows, count_ones(spans)

        def by_line(values: Sequence[int], unused: int) -> list[int]:
            """Unused one-token rows have their place in the step all the same."""
            ones, longer = list(values[:num_ones]), list(values[num_ones:])
            gap, rest = num_rows - num_ones, shape.prompts - len(longer)
            return ones + [unused] * gap + longer + [unused] * rest

        line = by_line([span.row for span in spans], NOBODY)
        line += by_line([span.start for span in spans], 0)
        line += by_line(inside.leads, NOBODY)
        counts = [span.len for span in spans[num_ones:]]
        ends = list(itertools.accumulate(counts, initial=num_rows))
        line += range(num_rows)
        line += ends + ends[-1:] * (shape.prompts - len(counts))
        for place, count in enumerate(counts, start=num_rows):
            line += [place] * count
        line += [NOBODY] * (num_rows + shape.tokens - ends[-1])
        tiles = self._tiles(num_rows, counts)
        line += itertools.chain(*tiles, *[(num_rows, NOWHERE)] * (self.num_tiles(shape) - len(tiles)))
        host = np.empty(len(line), dtype=np.int64)
        struct.pack_into(f"{len(line)}q", host.data, 0, *line)
        return host

    def _tiles(self, num_rows: int, counts: Sequence[int]) -> list[tuple[int, int]]:
        """Return (line, first query) of each tile. A span's last ones see the most keys and come first."""
        step = self.tile_queries
        rows = [(line, 0) for line in range(num_rows)] if self.tiles_rows else []
        spans = enumerate(counts, start=num_rows)
        return rows + [(line, at) for line, count in spans for at in reversed(range(0, count, step))]


def count_ones(spans: Sequence[Span]) -> int:
    """Return how many spans are of one token: they come first."""
    return next((i for i, span in enumerate(spans) if span.len > 1), len(spans))


def lines_of(shape: StepShape, spans: Sequence[Span]) -> list[int]:
    """Return the line of each span: one-token rows have the first lines, longer spans those behind all R."""
    num_ones = count_ones(spans)
    return [*range(num_ones), *range(shape.rows, shape.rows + len(spans) - num_ones)]


@dataclasses.dataclass(slots=True)
class PackedViews:
    """The parts of a packed line on the device."""

    plan_3B: Tensor
    # Who takes the greatest token and who draws, in a step with draws.
    inside_2B: Tensor | None = None
    query_start: Tensor | None = None
    line_T: Tensor | None = None
    tiles_M2: Tensor | None = None

    @classmethod
    def of(cls, packed: Tensor, shape: StepShape, layout: Layout) -> PackedViews:
        """Look at the beginning of `packed`; nothing is copied."""
        sizes = layout.sizes(shape)
        parts = torch.split(packed[: sum(sizes)], sizes)
        plan_3B = packed[: 3 * shape.lines].view(3, shape.lines)
        if not shape.prompts:
            lines = shape.lines
            return cls(plan_3B, packed[2 * lines : 4 * lines].view(2, lines) if shape.draws else None)
        return cls(plan_3B, None, parts[3], parts[4], parts[5].view(-1, 2))
