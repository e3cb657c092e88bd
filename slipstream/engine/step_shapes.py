"""Which steps are captured, and which of them serves a given plan? Sizes alone, no device.

A captured step runs a number of one-token rows beside a number of longer spans (prompts, or pieces of them)
with a number of tokens between them. What is smaller runs in it too, the rest being padding. A step pays
where launching its kernels one by one takes the host longer than the GPU computes: some 25 microseconds for
each of 8 kernels a layer, against 0.6 for each token of an 8B model's layer. So decoding is captured whatever
its size, pieces of prompts beside it up to 1,024 tokens, and a prompt alone, whose launches nothing hides, up
to 2,048.
Invariant: with padding, whatever a captured step can hold is served by it; without, decoding runs in steps of
exactly its size or kernel by kernel.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from slipstream.core.plan import StepPlan

# A prompt alone. Few tokens cost a product as much as 32 do; beyond 256 padding is an eighth at most.
LONE_TOKENS = (
    16, 32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 432, 480, 512,
    576, 640, 704, 768, 864, 960, 1024, 1152, 1280, 1408, 1536, 1728, 1920, 2048,
)  # fmt: skip
# Pieces of prompts beside decoding rows.
MIXED_ROWS = (8, 16, 32, 64, 128, 256)
MIXED_TOKENS = (64, 128, 192, 256, 384, 512, 768, 1024)
MIN_PROMPTS, TOKENS_PER_PROMPT = 8, 64
# What is captured first of each, so that everything soon has something that serves it.
FIRST_LONE = (1024, 512, 256, 128, 64, 32, 16)
FIRST_ROWS = (256, 128, 32, 8)
FIRST_TOKENS = (512, 256, 128)
# Beside readers a long prompt runs in pieces of what they can bear, whose number changes with its context.
FIRST_PIECES = (512, 384, 256, 192, 128, 64)
# Tokens that a step with prompts may run where half as many would do: this few cost little.
FREE_TOKENS = 256


class StepShape(NamedTuple):
    """What a step holds: one-token rows, longer spans, and the tokens of these.

    With `shared`, of a decode step, what rows begin with alike is read once for all of them; with `draws`
    rows may draw their tokens inside. Whatever a row asks for, steps without either can run it.
    """

    rows: int
    prompts: int = 0
    tokens: int = 0
    shared: bool = False
    draws: bool = False

    @property
    def lines(self) -> int:
        return self.rows + self.prompts

    @property
    def num_tokens(self) -> int:
        return self.rows + self.tokens

    def holds(self, other: StepShape) -> bool:
        fits = self.rows >= other.rows and self.prompts >= other.prompts and self.tokens >= other.tokens
        return fits and self.shared >= other.shared and self.draws >= other.draws

    def __str__(self) -> str:
        alike = " that begin alike" if self.shared else ""
        drawing = " with draws" if self.draws else ""
        decoding = f"decoding {self.rows} rows{alike}{drawing}" if self.rows else ""
        prompts = f"{self.prompts} prompts of {self.tokens} tokens" if self.prompts else ""
        return " beside ".join(part for part in (decoding, prompts) if part)


def is_decode_step(plan: StepPlan) -> bool:
    """Say whether every row of a plan runs its last token and is sampled, and nothing else is wanted."""
    if not plan.spans or plan.logits:
        return False
    # Short spans come first, so the ends say whether there are longer ones.
    if plan.spans[0].len > 1 or plan.spans[-1].len > 1:
        return False
    return [span.row for span in plan.spans] == plan.sample


def shape_needed(plan: StepPlan) -> StepShape | None:
    """Return what a plan holds, exactly; None for one that no captured step could run."""
    if plan.logits or not plan.spans:
        return None
    spans = plan.spans
    if spans[-1].len == 1:
        return StepShape(len(spans)) if is_decode_step(plan) else None
    rows = next(i for i, span in enumerate(spans) if span.len > 1)
    prompts = spans[rows:]
    if any(span.len == 1 or span.parents is not None for span in prompts):
        return None
    return StepShape(rows, len(prompts), sum(span.len for span in prompts))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class StepShapes:
    """All shapes that an engine may capture: `sizes` of decode steps, `lone` prompts, `mixed` steps.

    With `shares` and `draws`, decode steps are captured with and without each.
    """

    sizes: tuple[int, ...] = ()
    lone: tuple[StepShape, ...] = ()
    mixed: tuple[StepShape, ...] = ()
    has_padding: bool = True
    shares: bool = False
    draws: bool = False

    @classmethod
    def create(
        cls,
        sizes: Sequence[int],
        *,
        has_padding: bool,
        max_num_tokens: int,
        max_seq_len: int,
        shares: bool = False,
        draws: bool = False,
    ) -> StepShapes:
        """Return the shapes of an engine that captures decode steps of `sizes` (ascending), if any."""
        if not sizes:
            return cls(has_padding=has_padding)
        longest = min(max_num_tokens, max_seq_len)
        lone = [StepShape(0, 1, tokens) for tokens in _up_to(LONE_TOKENS, longest) if tokens > 1]
        widths = _up_to(MIXED_ROWS, sizes[-1]) if has_padding else ()
        # One long prompt has a shape of its own: attention has fewer tiles to look for, and can cut these.
        mixed = [
            StepShape(rows, prompts, tokens)
            for rows in widths
            for tokens in _up_to(MIXED_TOKENS, max_num_tokens)
            for prompts in (1, max(MIN_PROMPTS, tokens // TOKENS_PER_PROMPT))
            if tokens > 1
        ]
        # In the order of what they cost, so that the first that fits is the cheapest.
        mixed.sort(key=lambda shape: (shape.num_tokens, shape.lines))
        return cls(
            sizes=tuple(sizes),
            lone=tuple(lone),
            mixed=tuple(mixed),
            has_padding=has_padding,
            shares=shares,
            draws=draws,
        )

    def __len__(self) -> int:
        special = sum(map(len, self._special_kinds()))
        return len(self.sizes) + special + len(self.lone) + len(self.mixed)

    @property
    def shared(self) -> tuple[StepShape, ...]:
        """Decode steps whose rows begin alike, ascending."""
        return self.decoding(shared=True)

    def decoding(self, *, shared: bool = False, draws: bool = False) -> tuple[StepShape, ...]:
        """Return the decode steps of one kind, ascending; one row alone has nobody to share with."""
        if shared > self.shares or draws > self.draws:
            return ()
        sizes = [size for size in self.sizes if size > 1 or not shared]
        return tuple(StepShape(size, shared=shared, draws=draws) for size in sizes)

    def _special_kinds(self) -> list[tuple[StepShape, ...]]:
        """Return the decode steps that do more than others, by kind."""
        kinds = ((True, False), (False, True), (True, True))
        return [self.decoding(shared=shared, draws=draws) for shared, draws in kinds]

    @property
    def token_steps(self) -> tuple[int, ...]:
        """Numbers of prompt tokens beside decoding rows that need no padding, ascending."""
        return tuple(sorted({shape.tokens for shape in self.mixed}))

    def serving(self, need: StepShape) -> Iterator[StepShape]:
        """Return the shapes that a step may run in, the cheapest first; what wastes too much is left out."""
        if not need.prompts:
            most = 2 * need.rows if self.has_padding else need.rows
            # Much padding costs more than sharing and drawing inside spare.
            for kind in self._kinds_for(need):
                yield from (shape for shape in kind if need.rows <= shape.rows <= most)
            place = bisect.bisect_left(self.sizes, need.rows)
            for size in self.sizes[place:]:
                if size == need.rows or self.has_padding:
                    yield StepShape(size)
            return
        most = max(FREE_TOKENS, 2 * need.num_tokens)
        shapes = self.lone if need.prompts == 1 and not need.rows else self.mixed
        place = bisect.bisect_left(shapes, need.num_tokens, key=lambda shape: shape.num_tokens)
        for shape in shapes[place:]:
            if shape.num_tokens > most:
                break
            if shape.holds(need):
                yield shape

    def _kinds_for(self, need: StepShape) -> list[tuple[StepShape, ...]]:
        """Return the kinds that do what a decode step needs, or the most of it, those first that do all."""
        kinds: list[tuple[StepShape, ...]] = []
        if need.draws:
            kinds.append(self.decoding(shared=need.shared and self.shares, draws=True))
        if need.shared:
            kinds.append(self.decoding(shared=True))
        return kinds

    def largest(self) -> list[StepShape]:
        """Return the largest of each kind: between them they take the memory of all."""
        kinds = (self.decoding(), *self._special_kinds(), self.mixed, self.lone)
        return [shape for kind in kinds for shape in kind[-1:]]

    def in_order(self) -> list[StepShape]:
        """Return all shapes in the order in which a start captures them: the largest, then a few of each
        kind, then the rest of the decode steps, whose padding is met most often; those with draws last."""
        powers = {bisect.bisect_left(self.sizes, 2**n) for n in range(13)}
        ladder = [StepShape(self.sizes[i]) for i in sorted(powers, reverse=True) if i < len(self.sizes)]
        lone = [shape for tokens in FIRST_LONE for shape in self.lone if shape.tokens == tokens]
        mixed = [shape for shape in self.mixed if _is_first(shape)]
        rest = [StepShape(size) for size in self.sizes]
        alike = [shape for shape in self.shared if StepShape(shape.rows) in ladder][::-1]
        order = [*self.largest(), *ladder, *lone, *mixed[::-1], *alike]
        order += [*rest[::-1], *self.shared[::-1], *self.lone[::-1], *self.mixed[::-1]]
        for kind in (self.decoding(draws=True), self.decoding(shared=True, draws=True)):
            first = [shape for shape in kind if StepShape(shape.rows) in ladder]
            order += [*first[::-1], *kind[::-1]]
        return list(dict.fromkeys(order))


def _is_first(shape: StepShape) -> bool:
    return shape.rows in FIRST_ROWS and shape.tokens in (FIRST_PIECES if shape.prompts == 1 else FIRST_TOKENS)


def _up_to(steps: Sequence[int], bound: int) -> tuple[int, ...]:
    """Return the steps up to a bound, and the bound itself where it lies below the last."""
    bound = min(bound, steps[-1])
    return (*(step for step in steps if step < bound), bound)
