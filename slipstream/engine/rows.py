# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""What does the device remember between steps? One row per running request, at stable addresses.

Invariant: the device is the truth for lengths. `lengths[row]` counts the tokens of a row that the device
knows; a sampled token is appended here before the host has seen it, so a later plan may run it. The host
writes rows only through `apply` and reads nothing back.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from slipstream.core.plan import Span, StepPlan
from slipstream.kernels.tree_masks import tree_of


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


class Rows:
    """Token buffers, lengths and block tables of `max_rows` rows."""

    def __init__(
        self, *, max_rows: int, max_seq_len: int, num_groups: int, block_tokens: int, device: torch.device
    ) -> None:
        self.block_tokens = block_tokens
        self._device = device
        self._max_blocks = -(-max_seq_len // block_tokens)
        # One slot more than max_seq_len: the last sampled token is written, though it never runs.
        self.tokens = torch.zeros(max_rows, max_seq_len + 1, dtype=torch.int32, device=device)
        self.lengths = torch.zeros(max_rows, dtype=torch.int64, device=device)
        self.block_table = torch.zeros(
            num_groups, max_rows, self._max_blocks, dtype=torch.int32, device=device
        )
        self._flat_tokens, self._flat_table = self.tokens.view(-1), self.block_table.view(-1)
        # Host mirror of how many blocks each row's table holds; it only says where the next ones go.
        self._num_blocks = np.zeros((num_groups, max_rows), dtype=np.int64)
        self._max_rows = max_rows

    def apply(self, plan: StepPlan) -> None:
        """Bring rows and tables up to the plan: added, then new blocks, then tokens."""
        indices: list[int] = []
        pages: list[int] = []
        for init in plan.added:
            for group, blocks in enumerate(init.blocks):
                self._num_blocks[group, init.row] = 0
                self._place(group, init.row, blocks, indices, pages)
        for group, growth in plan.new_blocks.items():
            for row, blocks in growth:
                self._place(group, row, blocks, indices, pages)
        self._write([(init.row, 0, init.tokens) for init in plan.added], indices, pages)
        # Behind what was added: they may be of one row.
        self._write(plan.tokens, [], [])

    def _write(
        self, tokens: Sequence[tuple[int, int, Sequence[int]]], indices: Sequence[int], pages: Sequence[int]
    ) -> None:
        """Write tokens (row, start, ids), the lengths that follow, and entries of the tables: in one copy."""
        if not tokens and not indices:
            return
        width, num_rows, num_pages = self.tokens.shape[1], len(tokens), len(pages)
        num_ids = sum([len(ids) for _, _, ids in tokens])
        # Places first, then what goes there, two to a place: nothing is converted on the device.
        ends = np.cumsum([num_ids, num_rows, num_rows, num_pages, (num_ids + num_pages + 1) // 2]).tolist()
        host = np.empty(ends[-1], dtype=np.int64)
        narrow = host[ends[3] :].view(np.int32)
        at = 0
        for row, start, ids in tokens:
            end = at + len(ids)
            host[at:end] = np.arange(row * width + start, row * width + start + len(ids))
            narrow[at:end] = ids
            at = end
        host[num_ids : ends[1]] = [row for row, _, _ in tokens]
        host[ends[1] : ends[2]] = [start + len(ids) for _, start, ids in tokens]
        host[ends[2] : ends[3]] = indices
        narrow[num_ids : num_ids + num_pages] = pages
        packed = torch.from_numpy(host)
        if self._device.type == "cuda":
            packed = packed.pin_memory().to(self._device, non_blocking=True)
        values = packed[ends[3] :].view(torch.int32)
        if tokens:
            self._flat_tokens.index_copy_(0, packed[:num_ids], values[:num_ids])
            self.lengths.index_copy_(0, packed[num_ids : ends[1]], packed[ends[1] : ends[2]])
        if indices:
            entries, numbers = packed[ends[2] : ends[3]], values[num_ids : num_ids + num_pages]
            self._flat_table.index_copy_(0, entries, numbers)

    def _place(
        self, group: int, row: int, blocks: Sequence[int], indices: list[int], pages: list[int]
    ) -> None:
        first = int(self._num_blocks[group, row])
        base = (group * self._max_rows + row) * self._max_blocks + first
        indices += range(base, base + len(blocks))
        pages += blocks
        self._num_blocks[group, row] = first + len(blocks)

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
