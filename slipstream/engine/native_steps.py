# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""When is a step on a CPU one native call? When every row runs one token and the model has a native form.

What captured graphs are on a GPU, this is on a CPU: the same places in the runner ask for it.
Invariant: a row's logits have the bits of any other step's; where rows are not plainly greedy, the sampler
gets them and the rest goes its usual way.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from slipstream.attention.base import AttentionBackend
from slipstream.attention.cpu import round_up_seq_len
from slipstream.core.plan import StepPlan
from slipstream.engine.graphs import KvPlaces, StepOutput
from slipstream.engine.host_rows import HostRows
from slipstream.engine.packed_step import NOBODY, Inside
from slipstream.engine.step_shapes import StepShape, is_decode_step
from slipstream.kernels.cpu.block_records import DecodeStep, RowTables
from slipstream.kernels.cpu.library import library


class NativeSteps:
    """Decode steps of one engine. `model` returns what runs at the moment, which may be nothing."""

    # A step chooses every token inside or none.
    is_per_row = False

    def __init__(
        self, rows: HostRows, backend: AttentionBackend, model: Callable[[], Any], *, max_seq_len: int
    ) -> None:
        self._rows, self._model, self._max_seq_len = rows, model, max_seq_len
        self._backend: Any = backend
        self._library = library()
        self._tables = _tables_of(rows)
        self._step = DecodeStep(tables=ctypes.addressof(self._tables))
        self._logits = torch.empty(0)

    def forget(self) -> None:
        """Let go of what is as large as the model's output; records are filled in anew at each step."""
        self._logits = torch.empty(0)

    def shape_of(self, plan: StepPlan, *, draws: bool = False) -> StepShape | None:
        """Return the plan's own shape, or None where the step has to go the general way; none draws."""
        if not is_decode_step(plan):
            return None
        decoder = getattr(self._model(), "native_decoder", None)
        return StepShape(len(plan.sample)) if decoder is not None else None

    def launch(
        self, plan: StepPlan, shape: StepShape, model: Any, kv: KvPlaces, *, inside: Inside
    ) -> StepOutput:
        """Run the step; where every row gets its token inside, tokens are chosen and appended too."""
        size, is_greedy = shape.rows, NOBODY not in inside.leads
        decoder, records = model.native_decoder, self._backend.records
        kv_pages, layer_place = kv
        records.bind(kv_pages)
        starts = np.array([span.start for span in plan.spans], dtype=np.int64)
        rows = np.array(plan.sample, dtype=np.int64)
        bound = min(max(span.start for span in plan.spans) + 1, self._max_seq_len)
        longest = min(round_up_seq_len(bound), self._max_seq_len)
        decoder.stack.prepare(layer_place, records.layer_strides, longest)
        logits_RV = self._logits_of(size, model.config.vocab_size)
        drawn_2R = torch.empty(2, size, dtype=torch.int64)
        step = self._step
        step.decoder, step.groups = decoder.address, records.step.groups
        step.rows, step.starts = rows.ctypes.data, starts.ctypes.data
        step.num_rows, step.max_seq_len = size, longest
        step.logits = logits_RV.data_ptr()
        step.drawn = drawn_2R.data_ptr() if is_greedy else None
        address = ctypes.addressof(step)
        scratch = self._backend.scratch.fit(
            (decoder.address, size, longest), lambda: self._library.ss_decode_scratch_bytes(address)
        )
        status = self._library.ss_decode(address, scratch)
        assert status == 0, "the backend's capability lets no other head size through"
        decoder.stack.num_calls += 1
        return StepOutput(logits_RV, drawn_2R, range(size))

    def _logits_of(self, size: int, vocab_size: int) -> Tensor:
        if self._logits.shape[:1] < (size,):
            self._logits = torch.empty(size, vocab_size)
        return self._logits[:size]


def _tables_of(rows: HostRows) -> RowTables:
    return RowTables(
        tokens=rows.tokens.data_ptr(),
        lengths=rows.lengths.data_ptr(),
        block_table=rows.block_table.data_ptr(),
        token_stride=rows.tokens.stride(0),
        group_stride=rows.block_table.stride(0),
        row_stride=rows.block_table.stride(1),
        block_tokens=rows.block_tokens,
        num_groups=rows.block_table.shape[0],
    )
