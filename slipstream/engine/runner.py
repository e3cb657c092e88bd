# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""How does a plan become tokens? `launch` applies it and runs the forward, `sample` draws, `collect` reads.

Invariant: nothing between `launch` and `collect` waits for the device, and the host knows no token of a step
before `collect`: spans read their tokens from the row's device buffer. A failure of the step is an entry per
row of the result, never an exception out of the loop.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from slipstream.attention.base import AttentionBackend
from slipstream.core.batch import ForwardBatch
from slipstream.core.cache_group import CacheGroup
from slipstream.core.errors import UnsupportedError
from slipstream.core.plan import StepPlan, StepResult, TokenLogprobs
from slipstream.engine.rows import Rows, StepInputs
from slipstream.sampling.sampler import SampleOutput, Sampler

logger = logging.getLogger(__name__)

STATUS_MESSAGES = {
    1: "the model produced logits that are not finite (NaN or infinity) for this request",
    2: "every token is masked for this request: no token is allowed next",
}


class StepRunner(Protocol):
    """What the engine needs of whoever executes plans."""

    def launch(self, plan: StepPlan) -> Any: ...

    def sample(self, handle: Any, masks: Tensor | None = None) -> None: ...

    def collect(self, handle: Any) -> StepResult: ...


@dataclasses.dataclass(slots=True)
class StepHandle:
    """One launched step. `logits_RV` are of the rows of `plan.sample`, in that order.

    `is_finite_R` says of `quiet_rows`, whose spans are not sampled, whether their last hidden state is
    finite: a bad chunk must be known before its pages are reused.
    """

    plan: StepPlan
    logits_RV: Tensor | None = None
    quiet_rows: list[int] = dataclasses.field(default_factory=list[int])
    is_finite_R: Tensor | None = None
    sampled: SampleOutput | None = None
    error: str | None = None


class Runner:
    """One rank's model, pages and rows on one device."""

    def __init__(
        self,
        model: Any,
        groups: Sequence[CacheGroup],
        *,
        num_pages: int,
        max_batch_size: int,
        max_seq_len: int,
        kv_dtype: torch.dtype,
        device: torch.device,
        backend: AttentionBackend,
    ) -> None:
        self.model = model
        self.backend = backend
        self.groups = list(groups)
        self._device = device
        block_tokens = groups[0].block_tokens
        self.rows = Rows(
            max_rows=max_batch_size,
            max_seq_len=max_seq_len,
            num_groups=len(groups),
            block_tokens=block_tokens,
            device=device,
        )
        self.sampler = Sampler(max_rows=max_batch_size, vocab_size=model.config.vocab_size, device=device)
        self.pages = _allocate_pages(groups[0], num_pages, kv_dtype, device)
        self._layer_place = bind_layers(groups)
        self._kv_pages = [self.pages] * len(groups)

    def launch(self, plan: StepPlan) -> StepHandle:
        """Apply a plan and run its forward; blocks on a CPU, only enqueues on a GPU."""
        handle = StepHandle(plan)
        if plan.loads or plan.stores or plan.logits:
            raise UnsupportedError("Plans with loads, stores or logits are not served by this version.")
        try:
            with torch.inference_mode():
                self._apply(plan)
                self._forward(handle)
        except Exception as error:
            logger.exception("step %d failed", plan.step_id)
            handle.error = f"the step failed: {type(error).__name__}"
        return handle

    def _apply(self, plan: StepPlan) -> None:
        for row in plan.removed:
            self.sampler.remove(row)
        for init in plan.added:
            self.sampler.add(
                init.row, init.sampling, init.tokens, init.num_prompt, init.seed, init.sample_idx
            )
        self.rows.apply(plan)
        if plan.copies:
            # A page may be zeroed and then copied onto: the last copy of each destination counts.
            sources = {destination: source for source, destination in plan.copies}
            pairs = torch.tensor([list(sources), list(sources.values())], device=self._device)
            self.pages[pairs[0]] = self.pages[pairs[1]]

    def _forward(self, handle: StepHandle) -> None:
        plan = handle.plan
        for span in plan.spans:
            if span.stream != "decoder" or span.parents is not None or not span.causal:
                raise UnsupportedError("Encoder, tree and non-causal spans are not served by this version.")
        if not plan.spans:
            return
        inputs = self.rows.inputs(plan.spans)
        batch = self._batch(plan, inputs)
        hidden_TD = self.model.forward(batch)
        if len(plan.sample) < len(plan.spans):
            sampled = set(plan.sample)
            ends = np.cumsum(inputs.query_lens) - 1
            quiet = [
                (span.row, end) for span, end in zip(plan.spans, ends, strict=True) if span.row not in sampled
            ]
            handle.quiet_rows = [row for row, _ in quiet]
            last = torch.tensor([int(end) for _, end in quiet]).to(self._device, non_blocking=True)
            handle.is_finite_R = hidden_TD[last].isfinite().all(dim=1)
        if plan.sample:
            handle.logits_RV = self.model.logits(hidden_TD[batch.logits_idx])

    def _batch(self, plan: StepPlan, inputs: StepInputs) -> ForwardBatch:
        return ForwardBatch(
            token_ids_T=inputs.token_ids_T,
            positions_kT=inputs.positions_T[None],
            row_of_T=inputs.row_of_T,
            query_start=inputs.query_start,
            seq_lens=inputs.seq_lens,
            slot_mapping_T=list(inputs.slots_GT),
            block_table=list(inputs.block_table_GBM),
            kv_pages=self._kv_pages,
            layer_place=self._layer_place,
            attention_plan=self.backend.plan(query_lens=inputs.query_lens, max_seq_lens=inputs.max_seq_lens),
            logits_idx=self._logits_idx(plan, inputs.query_lens),
        )

    def _logits_idx(self, plan: StepPlan, query_lens: Sequence[int]) -> Tensor:
        """Return the index of the last token of each sampled row."""
        last = np.cumsum(query_lens) - 1
        if plan.sample == [span.row for span in plan.spans]:
            chosen = last
        else:
            span_of_row = {span.row: idx for idx, span in enumerate(plan.spans)}
            chosen = last[[span_of_row[row] for row in plan.sample]]
        return torch.from_numpy(np.ascontiguousarray(chosen)).to(self._device, non_blocking=True)

    def sample(self, handle: StepHandle, masks: Tensor | None = None) -> None:
        """Draw the tokens of a launched step and append them to their rows, on the device."""
        if handle.logits_RV is None:
            return
        try:
            with torch.inference_mode():
                rows = handle.plan.sample
                handle.sampled = self.sampler.sample(handle.logits_RV, rows, masks)
                rows_R = torch.tensor(rows, device=self._device)
                self.rows.append(rows_R, handle.sampled.token_ids_R)
        except Exception as error:
            logger.exception("sampling of step %d failed", handle.plan.step_id)
            handle.error = f"sampling failed: {type(error).__name__}"
        handle.logits_RV = None

    def collect(self, handle: StepHandle) -> StepResult:
        """Wait for a step and return what it brought, in host numbers."""
        plan = handle.plan
        if handle.error is not None:
            rows = [span.row for span in plan.spans]
            return StepResult(plan.step_id, row_errors=dict.fromkeys(rows, handle.error))
        result = StepResult(plan.step_id, executed_tokens=plan.num_tokens)
        if handle.is_finite_R is not None and not bool(handle.is_finite_R.all()):
            finite = zip(handle.quiet_rows, handle.is_finite_R.tolist(), strict=True)
            result.row_errors = {row: STATUS_MESSAGES[1] for row, is_finite in finite if not is_finite}
        if handle.sampled is None:
            return result
        ids = handle.sampled.token_ids_R.tolist()
        result.tokens = {row: [token] for row, token in zip(plan.sample, ids, strict=True)}
        statuses = handle.sampled.status_R
        if statuses.any():
            for row, status in zip(plan.sample, statuses.tolist(), strict=True):
                if status:
                    result.tokens[row] = []
                    result.row_errors[row] = STATUS_MESSAGES[status]
        result.logprobs = _logprobs(handle.sampled, plan.sample)
        return result


def _logprobs(sampled: SampleOutput, rows: Sequence[int]) -> dict[int, list[TokenLogprobs]]:
    found = ((row, sampled.logprobs_of(idx)) for idx, row in enumerate(rows))
    return {row: [logprobs] for row, logprobs in found if logprobs is not None}


def bind_layers(groups: Sequence[CacheGroup]) -> list[tuple[int, int]]:
    """Return (group, place in its pages) of every layer; models know only layer numbers."""
    places = {
        layer: (group_idx, place)
        for group_idx, group in enumerate(groups)
        for place, layer in enumerate(group.layers)
    }
    return [places[layer] for layer in range(len(places))]


def _allocate_pages(group: CacheGroup, num_pages: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return zeroed pages [pages, layers, 2, block_tokens, heads, head_dim]; a CPU touches none of them."""
    head_bytes = 2 * group.block_tokens * group.heads * group.head_dim * dtype.itemsize
    shape = (num_pages, group.page_bytes // head_bytes, 2, group.block_tokens, group.heads, group.head_dim)
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # The OS hands out zero pages on first touch; torch.zeros would touch all of them now.
    raw = np.zeros(num_pages * group.page_bytes, dtype=np.uint8)
    return torch.from_numpy(raw).view(dtype).view(shape)
