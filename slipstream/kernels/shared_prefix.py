"""How are rows with a common beginning laid out for a kernel that reads it once for all of them?

A group of rows whose block tables begin with the same pages is cut into tiles of some rows and chunks of some
positions; a tile and chunk is an entry, one piece of work for each kv head. What an entry leaves behind for
its rows is joined with what they have of their own (`shared_prefix_decode.py`).
Invariants: a row belongs to one group at most, and has at least one position of its own; the tensors keep
their addresses, so that a captured step is replayed for other groups; without groups nothing is launched.
R rows, E entries, K kv heads, G query heads of each.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

# Lines of a tensor core product that an entry fills: query heads of a kv head, row by row.
TILE_LINES = 64
# Programs of the kernel over entries that a multiprocessor holds, and where nothing runs side by side.
PROGRAMS_PER_SM = 2
CPU_PROGRAMS = 12
# Positions: chunks are multiples of what is read at once, and shorter ones would cost more in joining.
CHUNK_STEP = 64
MIN_CHUNK = 256
# Each group may leave one tile partly empty, and memory is laid out for all of them.
MAX_GROUPS = 32


@functools.cache
def num_programs(device: torch.device) -> int:
    """Return how many programs over entries run at once on a device."""
    if device.type != "cuda":
        return CPU_PROGRAMS
    return PROGRAMS_PER_SM * torch.cuda.get_device_properties(device).multi_processor_count


class SharedGroup(NamedTuple):
    """Rows of a step (their places in it), the first `tokens` positions of which are the same pages."""

    rows: tuple[int, ...]
    tokens: int


class SharedPrefixes(NamedTuple):
    """The groups of a step on the device, all int32.

    `count_1` is the number of entries. A line of `entries_E5` is (first of its rows in `members_R`, how many,
    the row whose table is read, first position, last + 1). `rows_5R` holds for each row of the step how many
    positions it shares (0: none), its first entry, their number, the step from one to the next, and its place
    among an entry's rows.
    """

    count_1: Tensor
    entries_E5: Tensor
    members_R: Tensor
    rows_5R: Tensor


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PrefixLayout:
    """How groups of at most `max_rows` rows are laid out. `heads` are the query heads of one kv head."""

    max_rows: int
    heads: int
    kv_heads: int
    programs: int

    @property
    def rows_of_entry(self) -> int:
        """Return how many rows fill a tile; 0 where a row alone does not fit."""
        return TILE_LINES // self.heads

    def max_entries(self, rows: int) -> int:
        """Return how many entries a step of so many rows has at most."""
        return -(-rows // self.rows_of_entry) + MAX_GROUPS + self._wanted_entries

    @property
    def _wanted_entries(self) -> int:
        return max(1, self.programs // self.kv_heads)

    @property
    def num_ints(self) -> int:
        # The count stands in four, so that what follows is aligned.
        return 4 + 8 * self._padded_entries + 6 * self.max_rows

    @property
    def _padded_entries(self) -> int:
        return -(-self.max_entries(self.max_rows) // 4) * 4

    def views(self, packed: Tensor, rows: int) -> SharedPrefixes:
        """Return the tensors of a step of so many rows within a packed one of `num_ints`."""
        first, second = 4, 4 + 8 * self._padded_entries
        entries_E8 = packed[first:second].view(-1, 8)[: self.max_entries(rows)]
        members_R = packed[second : second + rows]
        rows_5R = packed[second + self.max_rows :].view(5, self.max_rows)[:, :rows]
        return SharedPrefixes(packed[:1], entries_E8[:, :5], members_R, rows_5R)

    def pack(self, groups: Sequence[SharedGroup]) -> np.ndarray:
        """Return the packed tensor of some groups, of `MAX_GROUPS` at most."""
        packed = np.zeros(self.num_ints, dtype=np.int32)
        views = self.views(torch.from_numpy(packed), self.max_rows)
        entries, members = views.entries_E5.numpy(), views.members_R.numpy()
        rows_5R = views.rows_5R.numpy()
        chunk = self._chunk(groups)
        lines: list[tuple[int, ...]] = []
        member = 0
        for rows, tokens in groups:
            starts = range(0, len(rows), self.rows_of_entry)
            bounds = [(low, min(tokens, low + chunk)) for low in range(0, tokens, chunk)]
            place = np.arange(len(rows))
            members[member : member + len(rows)] = rows
            rows_5R[0, rows] = tokens
            rows_5R[1, rows] = len(lines) + place // self.rows_of_entry
            rows_5R[2, rows] = len(bounds)
            rows_5R[3, rows] = len(starts)
            rows_5R[4, rows] = place % self.rows_of_entry
            sizes = [min(self.rows_of_entry, len(rows) - at) for at in starts]
            tiles = [(member + at, size, rows[0]) for at, size in zip(starts, sizes, strict=True)]
            lines += [(*tile, *bound) for bound in bounds for tile in tiles]
            member += len(rows)
        if lines:
            entries[: len(lines)] = lines
        packed[0] = len(lines)
        return packed

    def _chunk(self, groups: Sequence[SharedGroup]) -> int:
        """Return how long chunks are, so that there are about as many pieces of work as programs."""
        positions = sum(-(-len(rows) // self.rows_of_entry) * tokens for rows, tokens in groups)
        chunk = max(MIN_CHUNK, -(-positions // self._wanted_entries))
        return -(-chunk // CHUNK_STEP) * CHUNK_STEP
