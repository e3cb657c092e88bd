# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""How does the step of one short prompt run without the host naming its kernels? Captured once per length.

A prompt of a hundred tokens takes a GPU less time than the host takes to launch its kernels one by one. So
the step of a single request's last span is captured for a few lengths and replayed for any shorter one;
tokens beyond the span are padding without a slot, behind everything that a real token sees.
Invariant: as of `DecodeGraphs`: a replay computes what the step would kernel by kernel, nothing waits for the
device but a capture, and `forget` is called when rows, pages or weights move.
T tokens of the captured length, G cache groups, C blocks of a row, V vocabulary.
"""

from __future__ import annotations

import bisect
from typing import Any

import torch
from torch import Tensor

from slipstream.attention.base import AttentionBackend
from slipstream.core.batch import ForwardBatch
from slipstream.core.plan import StepPlan
from slipstream.engine.graphs import Captured, GraphCapture, KvPlaces
from slipstream.engine.rows import Rows
from slipstream.kernels.greedy_append import greedy_append_op
from slipstream.sampling.state import to_device

# Beyond the last, a prompt keeps the GPU busy for longer than its launches take.
LENGTHS = (16, 32, 64, 96, 128, 192, 256, 384, 512)


class PromptGraphs:
    """Captured steps of one row's span by (length, whether its token is chosen inside)."""

    def __init__(
        self, capture: GraphCapture, rows: Rows, backend: AttentionBackend, *, max_seq_len: int
    ) -> None:
        self._capture, self._rows, self._backend = capture, rows, backend
        self._max_seq_len = max_seq_len
        self._lengths = [length for length in LENGTHS if length <= max_seq_len]
        self._captured: dict[tuple[int, bool], Captured] = {}
        device = rows.tokens.device
        # Row, first position, number of tokens.
        self._span = torch.zeros(3, dtype=torch.int64, device=device)
        self._drawn = torch.zeros(2, 1, dtype=torch.int64, device=device)

    def forget(self) -> None:
        self._captured.clear()

    def size_of(self, plan: StepPlan) -> int | None:
        """Return the captured length that serves a plan, or None where it has to run kernel by kernel."""
        if len(plan.spans) != 1 or len(plan.sample) != 1 or plan.logits:
            return None
        span = plan.spans[0]
        place = bisect.bisect_left(self._lengths, span.len)
        if span.len < 2 or span.parents is not None or place == len(self._lengths):
            return None
        return self._lengths[place]

    def launch(self, plan: StepPlan, size: int, model: Any, kv: KvPlaces, *, is_greedy: bool) -> Captured:
        """Replay the step for the plan's span; the tensors returned hold until the next launch."""
        captured = self._captured.get((size, is_greedy))
        if captured is None:
            # The row -1 stands for nobody: a length of 0, no slot.
            self._write(-1, 0, 0)
            made = self._capture.run(
                lambda: self._step(size, model, kv, is_greedy), f"a prompt of {size} tokens"
            )
            captured = self._captured[(size, is_greedy)] = made
        span = plan.spans[0]
        self._write(span.row, span.start, span.len)
        captured.graph.replay()
        self._capture.num_replays += 1
        return captured

    def _write(self, row: int, start: int, count: int) -> None:
        self._span.copy_(to_device([row, start, count], torch.int64, self._span.device))

    def _step(self, size: int, model: Any, kv: KvPlaces, is_greedy: bool) -> tuple[Tensor, Tensor]:
        rows, page = self._rows, self._rows.block_tokens
        row, start, count = self._span
        place_T = torch.arange(size, device=row.device)
        is_real_T = place_T < count
        position_T = torch.where(is_real_T, start + place_T, 0)
        # Tensors of one element, not numbers: an index that is a number is read by the host.
        row_1 = row.clamp(min=0)[None]
        tokens_L = rows.tokens.index_select(0, row_1)[0]
        table_GC = rows.block_table.index_select(1, row_1)[:, 0]
        page_GT = table_GC.index_select(1, position_T // page).to(torch.int64)
        slots_GT = torch.where(is_real_T, page_GT * page + position_T % page, -1)
        kv_pages, layer_place = kv
        end_1 = (start + count)[None]
        batch = ForwardBatch(
            token_ids_T=torch.where(is_real_T, tokens_L.index_select(0, position_T).to(torch.int64), 0),
            positions_kT=position_T[None],
            row_of_T=torch.zeros_like(place_T),
            query_start=torch.stack((torch.zeros_like(count), count)),
            seq_lens=end_1,
            slot_mapping_T=list(slots_GT),
            block_table=[table_C[None] for table_C in table_GC],
            kv_pages=kv_pages,
            layer_place=layer_place,
            attention_plan=self._backend.plan(query_lens=[size], max_seq_lens=[self._max_seq_len]),
            logits_idx=(count - 1).clamp(min=0)[None],
        )
        hidden_TD = model.forward(batch)
        logits_RV = model.logits(hidden_TD.index_select(0, batch.logits_idx))
        if is_greedy:
            greedy_append_op(logits_RV, row[None], rows.tokens, rows.lengths, self._drawn)
        return logits_RV, self._drawn
