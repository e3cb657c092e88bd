# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""How does a decode step run without the host naming its kernels? Captured once per size, then replayed.

A captured step holds everything from the look-up of tokens, positions and pages to the logits, and for greedy
rows the choice of the token and its place in the row too. The host writes the numbers of the rows, where they
have changed, and replays; unused rows of a size have the number -1 and touch nothing.
Invariant: a replay computes what the same step would kernel by kernel; nothing here waits for the device but
the capture itself, when a size is first met. Captured addresses are the rows', the pages' and the weights':
whoever replaces one of these calls `forget`.
R rows, G cache groups, C blocks of a row, V vocabulary.
"""

from __future__ import annotations

import bisect
import dataclasses
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from slipstream.attention.base import AttentionBackend
from slipstream.core.batch import ForwardBatch
from slipstream.core.plan import StepPlan
from slipstream.engine.rows import Rows
from slipstream.kernels.decode_inputs import decode_inputs_op
from slipstream.kernels.greedy_append import greedy_append_op

# The pages of each group, and where a layer finds its own: (group, place in the page).
KvPlaces = tuple[list[Tensor], list[tuple[int, int]]]

logger = logging.getLogger(__name__)

# A row's length on the device decides its position; the host need not name a bound.
NO_BOUND = 2**40
PADDING = -1


def is_decode_step(plan: StepPlan) -> bool:
    """Say whether every row of a plan runs its last token and is sampled, and nothing else is wanted."""
    rows = plan.sample
    if len(rows) != len(plan.spans) or not rows or plan.logits:
        return False
    pairs = zip(plan.spans, rows, strict=True)
    return all(span.len == 1 and span.row == row and span.parents is None for span, row in pairs)


@dataclasses.dataclass(slots=True)
class StaticInputs:
    """What every captured step reads and writes, at addresses that stay; sliced to the size of a step."""

    plan: Tensor
    token_ids_R: Tensor
    positions_R: Tensor
    seq_lens_R: Tensor
    slots: Tensor
    table: Tensor
    query_start: Tensor
    drawn: Tensor

    @classmethod
    def create(cls, max_size: int, rows: Rows, device: torch.device) -> StaticInputs:
        groups, _, blocks = rows.block_table.shape

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        return cls(
            plan=zeros(2 * max_size),
            token_ids_R=zeros(max_size),
            positions_R=zeros(max_size),
            seq_lens_R=zeros(max_size),
            slots=zeros(groups * max_size),
            table=zeros(groups, max_size, blocks, dtype=torch.int32),
            query_start=torch.arange(max_size + 1, device=device),
            drawn=zeros(2 * max_size),
        )


@dataclasses.dataclass(slots=True)
class Captured:
    """One captured step: `logits_RV` of all its rows, and what a greedy one drew [2, R]."""

    graph: Any
    logits_RV: Tensor
    drawn_2R: Tensor


class GraphCapture:
    """Where captured steps of an engine keep what they compute with: one pool of memory, and counters."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: Any = None
        self.num_bytes = 0
        self.num_replays = 0
        self.num_captures = 0

    def forget(self) -> None:
        """Let go of the pool; whoever holds a captured step lets go of it too."""
        self._pool, self.num_bytes = None, 0

    def run(self, step: Callable[[], tuple[Tensor, Tensor]], what: str) -> Captured:
        """Run a step, so that every kernel is loaded, then capture it. Blocks.

        Steps share the pool, since only one runs at a time and what it leaves is read before the next.
        """
        started = time.monotonic()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            # Read here, since entering a capture gives back what is cached.
            before = torch.cuda.memory_reserved(self._device)
            logits_RV, drawn_2R = step()
        self.num_captures += 1
        self.num_bytes += torch.cuda.memory_reserved(self._device) - before
        logger.info("captured %s in %.2f s", what, time.monotonic() - started)
        return Captured(graph, logits_RV, drawn_2R)


class DecodeGraphs:
    """Captured steps by (size, whether tokens are chosen inside). One engine's, on one CUDA device."""

    def __init__(
        self,
        capture: GraphCapture,
        rows: Rows,
        backend: AttentionBackend,
        sizes: Sequence[int],
        *,
        has_padding: bool,
        max_seq_len: int,
    ) -> None:
        self._sizes, self._has_padding = list(sizes), has_padding
        self._capture = capture
        self._rows, self._backend, self._max_seq_len = rows, backend, max_seq_len
        self._inputs: StaticInputs | None = None
        self._captured: dict[tuple[int, bool], Captured] = {}
        self._last_plan: tuple[int, list[int]] | None = None

    def forget(self) -> None:
        """Let go of everything captured and its memory; the next steps are captured anew."""
        self._captured.clear()
        self._inputs, self._last_plan = None, None

    def size_of(self, plan: StepPlan) -> int | None:
        """Return the size that serves a plan, or None where it has to run kernel by kernel.

        Served are steps in which every row runs its last token and is sampled.
        """
        if not is_decode_step(plan):
            return None
        rows = plan.sample
        place = bisect.bisect_left(self._sizes, len(rows))
        if place == len(self._sizes):
            return None
        size = self._sizes[place]
        return size if size == len(rows) or self._has_padding else None

    def launch(self, plan: StepPlan, size: int, model: Any, kv: KvPlaces, *, is_greedy: bool) -> Captured:
        """Replay the step for the plan's rows; the tensors returned hold until the next launch."""
        captured = self._captured.get((size, is_greedy))
        if captured is None:
            if self._inputs is None:
                device = self._rows.tokens.device
                self._inputs = StaticInputs.create(self._sizes[-1], self._rows, device)
            self._write_rows([], size)
            made = self._capture.run(lambda: self._step(size, model, kv, is_greedy), f"decoding {size} rows")
            captured = self._captured[(size, is_greedy)] = made
        self._write_rows(plan.sample, size)
        captured.graph.replay()
        self._capture.num_replays += 1
        return captured

    def _write_rows(self, rows: list[int], size: int) -> None:
        if self._last_plan is not None and self._last_plan == (size, rows):
            return
        assert self._inputs is not None
        host = np.full((2, size), PADDING, dtype=np.int64)
        host[0, : len(rows)] = rows
        host[1] = NO_BOUND
        pinned = torch.from_numpy(host).flatten().pin_memory()
        self._inputs.plan[: 2 * size].copy_(pinned, non_blocking=True)
        self._last_plan = (size, list(rows))

    def _step(self, size: int, model: Any, kv: KvPlaces, is_greedy: bool) -> tuple[Tensor, Tensor]:
        """Run a whole step of `size` rows from and into the static tensors."""
        inputs, rows = self._inputs, self._rows
        assert inputs is not None
        groups = rows.block_table.shape[0]
        plan_2R = inputs.plan[: 2 * size].view(2, size)
        slots_GR = inputs.slots[: groups * size].view(groups, size)
        token_ids_R, positions_R = inputs.token_ids_R[:size], inputs.positions_R[:size]
        seq_lens_R, table_GRC = inputs.seq_lens_R[:size], inputs.table[:, :size]
        decode_inputs_op(
            plan_2R,
            rows.tokens,
            rows.lengths,
            rows.block_table,
            rows.block_tokens,
            token_ids_R,
            positions_R,
            seq_lens_R,
            slots_GR,
            table_GRC,
        )
        kv_pages, layer_place = kv
        batch = ForwardBatch(
            token_ids_T=token_ids_R,
            positions_kT=positions_R[None],
            row_of_T=inputs.query_start[:size],
            query_start=inputs.query_start[: size + 1],
            seq_lens=seq_lens_R,
            slot_mapping_T=list(slots_GR),
            block_table=list(table_GRC),
            kv_pages=kv_pages,
            layer_place=layer_place,
            attention_plan=self._backend.plan(query_lens=[1] * size, max_seq_lens=[self._max_seq_len] * size),
            logits_idx=inputs.query_start[:size],
        )
        logits_RV = model.logits(model.forward(batch))
        drawn_2R = inputs.drawn[: 2 * size].view(2, size)
        if is_greedy:
            greedy_append_op(logits_RV, plan_2R[0], rows.tokens, rows.lengths, drawn_2R)
        return logits_RV, drawn_2R
