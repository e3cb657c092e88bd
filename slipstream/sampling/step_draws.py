"""How are tokens drawn inside a captured step, whose rows are but numbers on the device?

What a row asks for is read from the table of rows, so that the same step serves any mixture of them: with
temperature, top-p and min-p, from logits as they are.
Invariant: a row's token and status are those that `Sampler.sample` finds for the same logits at the same
position. Lines with a row number below 0 are not this file's: what was left of them stays.
Shapes: R lines of the step, N of them drawn, V vocabulary, L tokens a row can hold.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slipstream.sampling import state
from slipstream.sampling.base import OK
from slipstream.sampling.candidates import greatest, runs_kernels
from slipstream.sampling.filters import FilterParams, draw_full_by_tensors, draw_top_p_in_order
from slipstream.sampling.greedy import status_of
from slipstream.sampling.philox import Philox
from slipstream.sampling.state import RowTable
from slipstream.sampling.weights import scale_bits

COLUMNS = (state.TEMPERATURE, state.TOP_P, state.MIN_P, state.KEY_LOW, state.SAMPLE_IDX)


class StepDraws:
    """Draws of one sampler's rows."""

    def __init__(self, table: RowTable, *, vocab_size: int, device: torch.device) -> None:
        self._table, self._vocab_size = table, vocab_size
        self._philox = Philox(device)

    def prepare(self) -> None:
        """Bring the table up to date, before a step is captured or replayed. Waits for nothing."""
        self._table.flush()

    def run(
        self, logits_RV: Tensor, rows_R: Tensor, tokens_RL: Tensor, lengths_R: Tensor, out_2R: Tensor
    ) -> None:
        """Draw a token for each line of a (distinct) row, append it there, and count it.

        Token ids, then statuses, go to `out_2R` int64; `tokens_RL` int32 and `lengths_R` int64 have one line
        per row of the engine. By kernels it waits for nothing and can be captured.
        """
        assert logits_RV.dtype == torch.float32 and logits_RV.shape[1] == self._vocab_size
        if not runs_kernels(logits_RV):
            self.run_by_tensors(logits_RV, rows_R, tokens_RL, lengths_R, out_2R)
            return
        from slipstream.kernels.gpu.draw_append import draw_append

        tables = (self._table.floats, self._table.ints, self._table.position)
        bits = scale_bits(self._vocab_size)
        draw_append(logits_RV, rows_R, tables, tokens_RL, lengths_R, out_2R, columns=COLUMNS, bits=bits)

    def run_by_tensors(
        self, logits_RV: Tensor, rows_R: Tensor, tokens_RL: Tensor, lengths_R: Tensor, out_2R: Tensor
    ) -> None:
        """Do what `run` does, the definition; this waits for the device."""
        lines_N = (rows_R >= 0).nonzero()[:, 0]
        if not len(lines_N):
            return
        rows_N, x_NV = rows_R[lines_N], logits_RV[lines_N]
        status_N = status_of(greatest(x_NV)[0])
        drawn_N = self._draw(x_NV, rows_N).masked_fill(status_N != OK, 0)
        out_2R[0, lines_N], out_2R[1, lines_N] = drawn_N, status_N.to(torch.int64)
        tokens_RL[rows_N, lengths_R[rows_N]] = drawn_N.to(torch.int32)
        ones_N = torch.ones_like(rows_N)
        lengths_R.index_add_(0, rows_N, ones_N)
        self._table.advance(rows_N, ones_N)

    def _draw(self, x_NV: Tensor, rows_N: Tensor) -> Tensor:
        """Return a token for each row, by the way that it asks for."""
        floats, ints = self._table.floats[rows_N], self._table.ints[rows_N]
        key_2N = ints[:, state.KEY_LOW : state.KEY_HIGH + 1].T
        uniform_N = self._philox.uniform(key_2N, ints[:, state.SAMPLE_IDX], self._table.position[rows_N])
        params = FilterParams(
            temperature_N=floats[:, state.TEMPERATURE].to(torch.float32),
            top_p_N=floats[:, state.TOP_P],
            min_p_N=floats[:, state.MIN_P],
            top_k_N=ints[:, state.TOP_K],
        )
        drawn: list[Tensor] = []
        for n in range(len(rows_N)):
            part = slice(n, n + 1)
            one = (x_NV[part], uniform_N[part], params.part(part))
            if bool(params.top_p_N[n] < 1.0):
                drawn.append(draw_top_p_in_order(*one))
            else:
                drawn.append(draw_full_by_tensors(*one, has_min_p=True))
        return torch.cat(drawn)
