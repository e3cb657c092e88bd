"""How are tokens chosen inside a captured step, whose rows are but numbers on the device?

What a row asks for is read from the tables of rows, so that the same step serves any mixture of them: the
greatest or a draw with temperature, top-p and min-p, after penalties or without, with logprobs or without.
Invariant: a row's token, status and logprobs are those that `Sampler.sample` finds for the same logits at the
same position. Logits of lines that are nobody's here stay as they are.
Shapes: R lines of the step, N of them served, V vocabulary, L tokens a row can hold, W columns of logprobs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from slipstream.kernels.greedy_append import greedy_append_op
from slipstream.sampling import state
from slipstream.sampling.base import NUM_SCALARS, OK
from slipstream.sampling.batch import MAX_TOP
from slipstream.sampling.candidates import greatest, runs_kernels
from slipstream.sampling.filters import FilterParams, draw_full_by_tensors, draw_top_p_in_order
from slipstream.sampling.greedy import status_of
from slipstream.sampling.logprobs import pack_logprobs_by_tensors
from slipstream.sampling.penalties import PenaltyTables, put_back
from slipstream.sampling.philox import Philox
from slipstream.sampling.state import RowTable
from slipstream.sampling.weights import scale_bits

COLUMNS = (state.TEMPERATURE, state.TOP_P, state.MIN_P, state.KEY_LOW, state.SAMPLE_IDX)
WIDTH = NUM_SCALARS + 2 * MAX_TOP


class StepDraws:
    """Choices for one sampler's rows."""

    def __init__(
        self, table: RowTable, penalties: PenaltyTables, *, vocab_size: int, device: torch.device
    ) -> None:
        self._table, self._penalties, self._vocab_size = table, penalties, vocab_size
        self._philox = Philox(device)

    def prepare(self) -> None:
        """Bring the tables up to date, before a step is captured or replayed. Waits for nothing."""
        self._table.flush()
        self._penalties.prepare_step()

    def run(
        self,
        logits_RV: Tensor,
        rows_2R: Tensor,
        tokens_RL: Tensor,
        lengths_R: Tensor,
        out_2R: Tensor,
        logprobs_RW: Tensor,
    ) -> None:
        """Choose a token for each line of a (distinct) row, append it there, and count it.

        A row that takes its greatest logit stands in the first line of `rows_2R`, one that draws in the
        second; -1 elsewhere. Token ids, then statuses, go to `out_2R` int64, 0 for nobody; `tokens_RL` int32
        and `lengths_R` int64 have one line per row of the engine. Rows that want logprobs find them in their
        line of `logprobs_RW`, float64 [R, 4 + 2 * `MAX_TOP`]. The logits of served rows are left changed.
        By kernels it waits for nothing and can be captured.
        """
        assert logits_RV.dtype == torch.float32 and logits_RV.shape[1] == self._vocab_size
        places = (tokens_RL, lengths_R, out_2R)
        if not runs_kernels(logits_RV):
            self.run_by_tensors(logits_RV, rows_2R, *places, logprobs_RW)
            return
        from slipstream.kernels.gpu.draw_append import draw_append
        from slipstream.kernels.gpu.step_extras import ExtraColumns, StepExtras

        table, bits = self._table, scale_bits(self._vocab_size)
        columns = ExtraColumns(
            repetition=state.REPETITION,
            presence=state.PRESENCE,
            frequency=state.FREQUENCY,
            slot=state.SLOT,
            num_top=state.NUM_TOP,
        )
        asked = (table.floats, table.ints, self._penalties.places)
        extras = StepExtras.prepare_rows(logits_RV, rows_2R, asked, columns=columns, max_top=MAX_TOP)
        greedy_append_op(logits_RV, rows_2R[0], *places)
        tables = (table.floats, table.ints, table.position)
        draw_append(logits_RV, rows_2R[1], tables, *places, columns=COLUMNS, bits=bits)
        extras.finish_rows(out_2R, logprobs_RW, bits=bits)

    def run_by_tensors(
        self,
        logits_RV: Tensor,
        rows_2R: Tensor,
        tokens_RL: Tensor,
        lengths_R: Tensor,
        out_2R: Tensor,
        logprobs_RW: Tensor,
    ) -> None:
        """Do what `run` does, the definition; this waits for the device."""
        rows_R = rows_2R.amax(0)
        lines_N = (rows_R >= 0).nonzero()[:, 0]
        raw_NV = logits_RV[lines_N]
        take_back = self._penalise(logits_RV, rows_R)
        greedy_append_op(logits_RV, rows_2R[0], tokens_RL, lengths_R, out_2R)
        self._draw_lines(logits_RV, rows_2R[1], tokens_RL, lengths_R, out_2R)
        take_back()
        rows_N = rows_R[lines_N]
        for line, row, raw_V in zip(lines_N, rows_N, raw_NV, strict=True):
            num_top = int(self._table.ints[row, state.NUM_TOP])
            if num_top >= 0:
                token_1, status_1 = out_2R[:, line : line + 1]
                packed = pack_logprobs_by_tensors(raw_V[None], token_1, status_1, num_top=num_top)[0]
                scalars, ids, values = torch.split(packed, [NUM_SCALARS, num_top, num_top])
                logprobs_RW[line, : NUM_SCALARS + num_top] = torch.cat((scalars, ids))
                logprobs_RW[line, NUM_SCALARS + MAX_TOP : NUM_SCALARS + MAX_TOP + num_top] = values
        slots_N = self._table.ints[rows_N, state.SLOT]
        has_slot = slots_N >= 0
        if bool(has_slot.any()):
            self._penalties.count_by_tensors(slots_N[has_slot], out_2R[0, lines_N][has_slot])

    def _penalise(self, logits_RV: Tensor, rows_R: Tensor) -> Callable[[], None]:
        """Change the logits of rows with a slot in place; returns what brings them back."""
        slots_R = self._table.ints[rows_R.clamp(min=0), state.SLOT]
        lines_P = ((rows_R >= 0) & (slots_R >= 0)).nonzero()[:, 0]
        if not len(lines_P):
            return lambda: None
        floats = self._table.floats[rows_R[lines_P]].to(torch.float32)
        asked = (floats[:, column] for column in (state.REPETITION, state.PRESENCE, state.FREQUENCY))
        places, old = self._penalties.penalise_by_tensors(logits_RV, lines_P, slots_R[lines_P], *asked)
        return lambda: put_back(logits_RV, places, old)

    def _draw_lines(
        self, logits_RV: Tensor, rows_R: Tensor, tokens_RL: Tensor, lengths_R: Tensor, out_2R: Tensor
    ) -> None:
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
