# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""What does the device remember between steps? One row per running request, at stable addresses.

Invariant: the device is the truth for lengths. `lengths[row]` counts the tokens of a row that the device
knows; a sampled token is appended here before the host has seen it, so a later plan may run it. The host
writes rows only through `apply` and reads nothing back.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import struct
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from slipstream.core.plan import Span, StepPlan
from slipstream.kernels.tree_masks import tree_of

# Kernels are compiled for tensors that begin at multiples of 16 bytes; torch aligns its own to 256.
ALIGNED_INTS = 64
# So many numbers are packed faster one by one than by the array operations that many need.
FEW = 1024

# Numbers of 32 bits that follow each other, and the place of the first.
Run = tuple[int, Sequence[int]]


@dataclasses.dataclass(slots=True)
class StepInputs:
    """Device tensors of one step. G groups, T tokens, B rows of the batch; `bound` is the longest row.

    `positions_T` are those of rotary embeddings, in a tree of drafts others than the slots'. `tree_T` are the
    bits of trees, None in a step without.
    """

    rows_B: Tensor
    row_of_T: Tensor
    query_start: Tensor
    positions_T: Tensor
    token_ids_T: Tensor
    seq_lens: Tensor
    slots_GT: Tensor
    block_table_GBM: Tensor
    query_lens: list[int]
    max_seq_lens: list[int]
    tree_T: Tensor | None = None


def tree_lines(spans: Sequence[Span], num_tokens: int) -> np.ndarray | None:
    """Return per token of the step its tree's bits, and its depth less its offset; None without a tree."""
    if not [span for span in spans if span.parents is not None]:
        return None
    lines_2T = np.zeros((2, num_tokens), dtype=np.int64)
    first = 0
    for span in spans:
        # A lone token of a tree is one of any row.
        if span.parents is not None and span.len > 1:
            tree = tree_of(tuple(span.parents))
            lines_2T[0, first : first + span.len] = tree.bits
            lines_2T[1, first : first + span.len] = tree.depths
            lines_2T[1, first : first + span.len] -= np.arange(span.len)
        first += span.len
    return lines_2T if lines_2T[0].any() else None


def _put_places(host: np.ndarray, runs: Sequence[Run], count: int) -> None:
    """Put the place of each of `count` numbers at the beginning of `host`."""
    if count > FEW:
        lens = np.array([len(run) for _, run in runs])
        shifts = np.array([place for place, _ in runs]) - (np.cumsum(lens) - lens)
        np.add(np.arange(count), np.repeat(shifts, lens), out=host[:count])
        return
    # Of few numbers a lone prompt's are typical, and then none of numpy's code is in a cache.
    places = itertools.chain(*[range(place, place + len(run)) for place, run in runs])
    struct.pack_into(f"{count}q", host.data, 0, *places)


class Rows:
    """Token buffers, lengths and block tables of `max_rows` rows."""

    def __init__(
        self, *, max_rows: int, max_seq_len: int, num_groups: int, block_tokens: int, device: torch.device
    ) -> None:
        self.block_tokens = block_tokens
        self._device = device
        self._max_blocks = -(-max_seq_len // block_tokens)
        # One slot more than max_seq_len: the last sampled token is written, though it never runs.
        shapes = ((max_rows, 2), (max_rows, max_seq_len + 1), (num_groups, max_rows, self._max_blocks))
        sizes = [math.prod(shape) for shape in shapes]
        # All of it is one tensor, so that what a plan changes takes one copy and one scatter.
        firsts = [0, *itertools.accumulate(-(-size // ALIGNED_INTS) * ALIGNED_INTS for size in sizes)]
        self._numbers = torch.zeros(firsts[-1], dtype=torch.int32, device=device)
        views = [
            self._numbers[first : first + size].view(shape)
            for first, size, shape in zip(firsts, sizes, shapes, strict=False)
        ]
        self.lengths = views[0].view(torch.int64).view(-1)
        self.tokens, self.block_table = views[1:]
        self._first_token, self._first_page = firsts[1:3]
        # Host mirror of how many blocks each row's table holds; it only says where the next ones go.
        self._num_blocks = np.zeros((num_groups, max_rows), dtype=np.int64)
        self._max_rows = max_rows

    def apply(self, plan: StepPlan) -> None:
        """Bring rows and tables up to the plan: added, then new blocks, then tokens."""
        runs: list[Run] = []
        for init in plan.added:
            self._place_tokens(init.row, 0, init.tokens, runs)
            for group, blocks in enumerate(init.blocks):
                self._num_blocks[group, init.row] = 0
                self._place_blocks(group, init.row, blocks, runs)
        for group, growth in plan.new_blocks.items():
            for row, blocks in growth:
                self._place_blocks(group, row, blocks, runs)
        self._write(runs)
        if plan.tokens:
            # Behind what was added: they may be of one row.
            runs = []
            for row, start, ids in plan.tokens:
                self._place_tokens(row, start, ids, runs)
            self._write(runs)

    def _place_tokens(self, row: int, start: int, ids: Sequence[int], runs: list[Run]) -> None:
        """Note where tokens go, and the length that follows: 64 bits, of which the upper half is 0."""
        runs.append((self._first_token + row * self.tokens.shape[1] + start, ids))
        runs.append((2 * row, (start + len(ids), 0)))

    def _place_blocks(self, group: int, row: int, blocks: Sequence[int], runs: list[Run]) -> None:
        first = int(self._num_blocks[group, row])
        line = group * self._max_rows + row
        runs.append((self._first_page + line * self._max_blocks + first, blocks))
        self._num_blocks[group, row] = first + len(blocks)

    def _write(self, runs: Sequence[Run]) -> None:
        """Write runs of numbers, no place twice: one copy to the device and one scatter there."""
        numbers: list[int] = []
        for _, run in runs:
            numbers += run
        if not numbers:
            return
        count = len(numbers)
        # Places of 64 bits first, then the numbers, two to a place: nothing is converted on the device.
        is_cuda = self._device.type == "cuda"
        packed = torch.empty(count + (count + 1) // 2, dtype=torch.int64, pin_memory=is_cuda)
        host = packed.numpy()
        _put_places(host, runs, count)
        struct.pack_into(f"{count}i", host.data, 8 * count, *numbers)
        if is_cuda:
            packed = packed.to(self._device, non_blocking=True)
        self._numbers.index_copy_(0, packed[:count], packed[count:].view(torch.int32)[:count])

    def pages_of(self, row: int) -> list[list[int]]:
        """Return a row's block table per group. Blocks the device; for errors and tests."""
        return [
            self.block_table[group, row, : self._num_blocks[group, row]].tolist()
            for group in range(self.block_table.shape[0])
        ]

    def inputs(self, spans: Sequence[Span]) -> StepInputs:
        """Turn the spans of a plan into the device tensors of one forward. Reads no device value."""
        query_lens = [span.len for span in spans]
        lens = np.array(query_lens, dtype=np.int64)
        ends = np.cumsum(lens)
        total = int(ends[-1])
        row_of = np.repeat(np.arange(len(spans)), lens)
        host = np.empty((2, len(spans)), dtype=np.int64)
        host[0] = [span.row for span in spans]
        host[1] = [span.start for span in spans]
        bounds = host[1] + lens
        trees_2T = tree_lines(spans, total)
        trees = () if trees_2T is None else (trees_2T.reshape(-1),)
        packed = torch.from_numpy(
            np.concatenate([host[0], host[1], lens, ends - lens, [total], row_of, *trees])
        )
        if self._device.type == "cuda":
            # From ordinary memory the copy could wait for the steps before it.
            packed = packed.pin_memory().to(self._device, non_blocking=True)
        size = len(spans)
        rows_B, start_B, len_B = packed[:size], packed[size : 2 * size], packed[2 * size : 3 * size]
        query_start = packed[3 * size : 4 * size + 1]
        row_of_T, tree_T, shift_T = packed[4 * size + 1 :], None, None
        if trees_2T is not None:
            row_of_T, tree_T, shift_T = row_of_T.view(3, total)
        # A decode span's start is an upper bound; the device's length decides.
        start_B = torch.minimum(start_B, self.lengths[rows_B] - 1)
        offset_T = torch.arange(total, device=self._device) - query_start[row_of_T]
        positions_T = start_B[row_of_T] + offset_T
        rows_T = rows_B[row_of_T]
        num_blocks = -(-int(bounds.max()) // self.block_tokens)
        pages_GT = self.block_table[:, rows_T, positions_T // self.block_tokens].to(torch.int64)
        return StepInputs(
            rows_B=rows_B,
            row_of_T=row_of_T,
            query_start=query_start,
            positions_T=positions_T if shift_T is None else positions_T + shift_T,
            token_ids_T=self.tokens[rows_T, positions_T].to(torch.int64),
            seq_lens=start_B + len_B,
            slots_GT=pages_GT * self.block_tokens + positions_T % self.block_tokens,
            block_table_GBM=self.block_table[:, rows_B, :num_blocks],
            query_lens=query_lens,
            max_seq_lens=bounds.tolist(),
            tree_T=tree_T,
        )

    def append(self, rows_R: Tensor, token_ids_R: Tensor) -> None:
        """Append one sampled token to each row, on the device."""
        lengths = self.lengths[rows_R]
        self.tokens[rows_R, lengths] = token_ids_R.to(torch.int32)
        self.lengths[rows_R] = lengths + 1
