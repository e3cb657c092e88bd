# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""What changes about rows where the device is the host itself? Nothing but how fast a step is described.

A step on a CPU takes milliseconds, and a dozen small tensor operations a tenth of one; the same in numpy,
over the same memory, takes a few microseconds.
Invariant: `inputs` and `append` give what `Rows` gives, which tests compare.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from slipstream.core.plan import Span
from slipstream.engine.rows import Rows, StepInputs, tree_lines


class HostRows(Rows):
    """Rows in host memory."""

    def __init__(
        self, *, max_rows: int, max_seq_len: int, num_groups: int, block_tokens: int, device: torch.device
    ) -> None:
        super().__init__(
            max_rows=max_rows,
            max_seq_len=max_seq_len,
            num_groups=num_groups,
            block_tokens=block_tokens,
            device=device,
        )
        # Views: both names are of one memory.
        self._tokens = self.tokens.numpy()
        self._lengths = self.lengths.numpy()
        self._table = self.block_table.numpy()

    def inputs(self, spans: Sequence[Span]) -> StepInputs:
        """Turn the spans of a plan into the tensors of one forward."""
        num_spans = len(spans)
        query_lens = [span.len for span in spans]
        rows = np.array([span.row for span in spans], dtype=np.int64)
        planned = np.array([span.start for span in spans], dtype=np.int64)
        lens = np.array(query_lens, dtype=np.int64)
        # A decode span's start is an upper bound; the row's length decides.
        starts = np.minimum(planned, self._lengths[rows] - 1)
        query_start = np.zeros(num_spans + 1, dtype=np.int64)
        np.cumsum(lens, out=query_start[1:])
        total = int(query_start[-1])
        if total == num_spans:
            row_of, rows_T, positions = np.arange(num_spans), rows, starts
        else:
            row_of = np.repeat(np.arange(num_spans), lens)
            rows_T = rows[row_of]
            positions = np.arange(total) + (starts - query_start[:-1])[row_of]
        bounds = planned + lens
        num_blocks = -(-int(bounds.max()) // self.block_tokens)
        pages = self._table[:, rows_T, positions // self.block_tokens].astype(np.int64)
        trees_2T = tree_lines(spans, total)
        places = positions if trees_2T is None else positions + trees_2T[1]
        return StepInputs(
            rows_B=torch.from_numpy(rows),
            row_of_T=torch.from_numpy(row_of),
            query_start=torch.from_numpy(query_start),
            positions_T=torch.from_numpy(places),
            token_ids_T=torch.from_numpy(self._tokens[rows_T, positions].astype(np.int64)),
            seq_lens=torch.from_numpy(starts + lens),
            slots_GT=torch.from_numpy(pages * self.block_tokens + positions % self.block_tokens),
            block_table_GBM=torch.from_numpy(self._table[:, rows, :num_blocks]),
            query_lens=query_lens,
            max_seq_lens=bounds.tolist(),
            tree_T=None if trees_2T is None else torch.from_numpy(trees_2T[0]),
        )

    def append(self, rows_R: Tensor, token_ids_R: Tensor) -> None:
        """Append one sampled token to each row."""
        rows = rows_R.numpy()
        lengths = self._lengths[rows]
        self._tokens[rows, lengths] = token_ids_R.numpy()
        self._lengths[rows] = lengths + 1
