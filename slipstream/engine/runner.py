# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""How does a plan become tokens? `launch` applies it and runs the forward, `sample` draws, `collect` reads.

Invariant: nothing between `launch` and `collect` waits for the device, and the host knows no token of a step
before `collect`: spans read their tokens from the row's device buffer. A failure of the step is an entry per
row of the result, never an exception out of the loop.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from slipstream.attention.base import AttentionBackend
from slipstream.attention.registry import DeviceFacts, require_trees
from slipstream.core.batch import ForwardBatch
from slipstream.core.cache_group import CacheGroup
from slipstream.core.errors import UnsupportedError
from slipstream.core.plan import StepPlan, StepResult
from slipstream.engine.faults import describe_fault
from slipstream.engine.graphs import Captured, GraphCapture, KvPlaces, StepGraphs, StepOutput
from slipstream.engine.host_rows import HostRows
from slipstream.engine.native_steps import NativeSteps
from slipstream.engine.packed_step import NOBODY, Inside
from slipstream.engine.rows import Rows, StepInputs
from slipstream.engine.shared_rows import SharedRows, heads_of_kv_head, shares_beginnings
from slipstream.engine.step_handle import Drawn, StepHandle, read_step
from slipstream.engine.step_shapes import StepShape, StepShapes, is_decode_step
from slipstream.engine.wanted_logits import WantedLogits
from slipstream.kernels.tree_masks import require_tree
from slipstream.sampling.base import HostCopy
from slipstream.sampling.history import TokenHistory
from slipstream.sampling.processors import ProcessorTable
from slipstream.sampling.sampler import Sampler
from slipstream.sampling.state import to_device

logger = logging.getLogger(__name__)

# A capture that takes longer has compiled something.
LONGEST_CAPTURE_S = 0.3


class StepRunner(Protocol):
    """What the engine needs of whoever executes plans."""

    def launch(self, plan: StepPlan) -> Any: ...

    def sample(self, handle: Any, masks: Tensor | None = None) -> None: ...

    def collect(self, handle: Any) -> StepResult: ...

    @property
    def processors(self) -> ProcessorTable: ...

    @property
    def needs_host_tokens(self) -> bool: ...

    @property
    def counters(self) -> dict[str, int]: ...

    @property
    def has_model(self) -> bool: ...

    def set_model(self, model: Any) -> None: ...

    def drop_pages(self) -> None: ...

    def make_pages(self) -> None: ...

    def capture_within(self, budget_s: float) -> None: ...

    @property
    def wants_capture(self) -> bool: ...

    def capture_wanted(self) -> None: ...


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
        shapes: StepShapes | None = None,
    ) -> None:
        self.model = model
        self.backend = backend
        # Says what went wrong with a step; whoever knows where memory went says that too.
        self.describe_fault: Callable[..., str] = describe_fault
        self.groups = list(groups)
        self._device = device
        block_tokens = groups[0].block_tokens
        self.rows = (HostRows if device.type == "cpu" else Rows)(
            max_rows=max_batch_size,
            max_seq_len=max_seq_len,
            num_groups=len(groups),
            block_tokens=block_tokens,
            device=device,
        )
        self.sampler = Sampler(
            max_rows=max_batch_size,
            vocab_size=model.config.vocab_size,
            device=device,
            history=TokenHistory(self.rows.tokens, self.rows.lengths),
        )
        self.processors = ProcessorTable()
        self._wanted = WantedLogits(self.rows)
        self._num_pages, self._kv_dtype = num_pages, kv_dtype
        self.make_pages()
        self._layer_place = bind_layers(groups)
        # How rows begin, where the backend reads once what they share.
        self._shared: SharedRows | None = None
        if shares_beginnings(backend, model, groups, max_batch_size):
            self._shared = SharedRows(
                groups,
                heads=heads_of_kv_head(model.config),
                max_rows=max_batch_size,
                kv_dtype=kv_dtype,
                device=device,
            )
        # Captured steps, where the backend can be replayed; without shapes every step runs kernel by kernel.
        self._capture = GraphCapture(device)
        self.graphs: StepGraphs | None = None
        if shapes is not None and len(shapes):
            places = (self._capture, self.rows, backend, shapes)
            self.graphs = StepGraphs(
                *places,
                max_seq_len=max_seq_len,
                dtype=kv_dtype,
                shared=self._shared,
                draws=self.sampler.step_draws() if shapes.draws else None,
            )
        self._steps: StepGraphs | NativeSteps | None = self.graphs
        if isinstance(self.rows, HostRows) and backend.capability.native_blocks:
            self._steps = NativeSteps(self.rows, backend, lambda: self.model, max_seq_len=max_seq_len)
        # Which of these rows get their token inside, as of a version of the sampler.
        self._last_inside: tuple[int, list[int], tuple[Inside, Inside]] | None = None
        self._num_inside_draws = 0

    @property
    def counters(self) -> dict[str, int]:
        """Return what shows how steps ran: graphs captured and replayed, and the memory they hold."""
        shared = self._shared
        return {
            # Decode steps in which rows' common beginning was read once, such rows, and positions spared.
            "num_shared_prefix_steps": shared.num_steps if shared is not None else 0,
            "num_shared_prefix_rows": shared.num_rows if shared is not None else 0,
            "num_spared_positions": shared.num_spared_positions if shared is not None else 0,
            "num_graphs": self._capture.num_captures,
            "num_graph_steps": self._capture.num_replays,
            # Of these captures those that requests waited for.
            "num_late_graphs": self.graphs.num_late_captures if self.graphs is not None else 0,
            "graph_bytes": self._capture.num_bytes,
            # Tokens that captured steps chose inside otherwise than as the greatest.
            "num_inside_draws": self._num_inside_draws,
            # Steps whose layers ran as native calls; 0 for models that know of none.
            "num_native_steps": getattr(self.model, "num_native_steps", 0),
        }

    @property
    def has_model(self) -> bool:
        return self.model is not None

    def set_model(self, model: Any) -> None:
        """Run another model of the same configuration from the next step on, or (None) let go of it."""
        self.model = model
        self._forget_graphs()

    def _forget_graphs(self) -> None:
        """Captured steps hold the addresses of weights and pages."""
        if self._steps is not None:
            self._steps.forget()
        self._capture.forget()

    def capture(self, shape: StepShape) -> Captured:
        """Capture a step of this shape, whose rows are nobody's; blocks."""
        assert self.graphs is not None
        with torch.inference_mode():
            return self.graphs.capture(shape, self.model, self._kv)

    def capture_within(self, budget_s: float) -> None:
        """Capture steps before there are requests, the most useful ones first, until the time is over.

        Compiling, which a machine does once, is not of that time.
        """
        left_s = budget_s
        for shape in self.graphs.missing() if self.graphs is not None else []:
            if left_s <= 0.0:
                break
            started = time.monotonic()
            self.capture(shape)
            left_s -= min(time.monotonic() - started, LONGEST_CAPTURE_S)

    @property
    def wants_capture(self) -> bool:
        """Say whether there is a step that could be captured before it is met."""
        is_awake = self.model is not None and bool(self._kv_pages)
        return is_awake and self.graphs is not None and self.graphs.is_missing

    def capture_wanted(self) -> None:
        """Capture the step that was missed most, while nothing runs; blocks for a part of a second."""
        assert self.graphs is not None
        shape = self.graphs.missing()[0]
        try:
            self.capture(shape)
        except Exception:
            # Nothing waits for it: such steps go on as they did.
            logger.exception("a step of %s could not be captured and runs kernel by kernel", shape)

    @property
    def _kv(self) -> KvPlaces:
        return self._kv_pages, self._layer_place

    def drop_pages(self) -> None:
        """Give the memory of all pages back; no step may run before `make_pages`."""
        self._forget_graphs()
        self.pages = torch.empty(0)
        self._kv_pages: list[Tensor] = []

    def make_pages(self) -> None:
        """Allocate all pages, zeroed."""
        self.pages = _allocate_pages(self.groups[0], self._num_pages, self._kv_dtype, self._device)
        self._kv_pages = [self.pages] * len(self.groups)

    def launch(self, plan: StepPlan) -> StepHandle:
        """Apply a plan and run its forward; blocks on a CPU, only enqueues on a GPU."""
        handle = StepHandle(plan)
        self._require_served(plan)
        try:
            with torch.inference_mode():
                self._apply(plan)
                self._forward(handle)
        except Exception as error:
            logger.exception("step %d failed", plan.step_id)
            handle.error = self.describe_fault(error)
        return handle

    def _require_served(self, plan: StepPlan) -> None:
        """Raise for what no step can do, before anything has changed."""
        if plan.loads or plan.stores:
            raise UnsupportedError("Plans with loads or stores are not served by this version.")
        if [span for span in plan.spans if span.stream != "decoder" or not span.causal]:
            raise UnsupportedError("Encoder and non-causal spans are not served by this version.")
        for span in [span for span in plan.spans if span.parents is not None]:
            require_tree(span.parents or (), row=span.row, num_tokens=span.len)
            if span.len > 1:
                require_trees(self.backend, DeviceFacts(device=str(self._device)), self.groups)
            if span.len > 1 and span.row in plan.sample:
                raise UnsupportedError(
                    f"Row {span.row} runs a tree of drafts and is to be sampled, and which of them its token "
                    "would follow is not known; ask for the logits of its tokens instead (plan.logits)."
                )

    def _apply(self, plan: StepPlan) -> None:
        for row in plan.removed:
            self.sampler.remove(row)
            self.processors.remove(row)
        for init in plan.added:
            self.sampler.add(
                init.row, init.sampling, init.tokens, init.num_prompt, init.seed, init.sample_idx
            )
            if init.sampling.has_processors:
                self.processors.add(init.row, init.request_id, init.tokens, init.num_prompt)
        self._wanted.apply(plan)
        self.rows.apply(plan)
        if self._shared is not None:
            self._shared.apply(plan)
        if plan.copies:
            # A page may be zeroed and then copied onto: the last copy of each destination counts.
            sources = {destination: source for source, destination in plan.copies}
            pairs = to_device([list(sources), list(sources.values())], torch.int64, self._device)
            self.pages[pairs[0]] = self.pages[pairs[1]]

    def _forward(self, handle: StepHandle) -> None:
        plan = handle.plan
        if not plan.spans or self._replay(handle):
            return
        handle.open_rows = plan.sample
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
            last = to_device([int(end) for _, end in quiet], torch.int64, self._device)
            handle.is_finite = HostCopy(hidden_TD[last].isfinite().all(dim=1))
        if plan.sample:
            # One token a row, sampled in order: the hidden states are what the head needs, as they are.
            is_whole = hidden_TD.shape[0] == len(plan.sample) and plan.sample == [s.row for s in plan.spans]
            handle.logits_RV = self.model.logits(hidden_TD if is_whole else hidden_TD[batch.logits_idx])
        if plan.logits:
            handle.wanted = self._wanted.compute(self.model, plan, hidden_TD, handle.logits_RV)

    def _replay(self, handle: StepHandle) -> bool:
        """Run the step by a captured graph or as one native call, where there is one for it."""
        plan, steps = handle.plan, self._steps
        if steps is None:
            return False
        inside, without_draws = self._inside(plan.sample)
        shape = steps.shape_of(plan, draws=inside.count > without_draws.count)
        if self.graphs is not None:
            shape = self._capture_due(self.graphs) or shape
        if shape is None:
            return False
        num_inside_draws = inside.count - without_draws.count
        if not shape.draws:
            inside, num_inside_draws = without_draws, 0
        if not steps.is_per_row and NOBODY in inside.rows:
            inside = Inside.nobody(len(plan.sample))
        if len(plan.sample) != len(plan.spans) or shape.prompts:
            inside = inside.by_span(plan.sample, plan.spans)
        step = steps.launch(plan, shape, self.model, self._kv, inside=inside)
        if num_inside_draws:
            self._num_inside_draws += num_inside_draws
            self.sampler.note_draws_elsewhere()
        self._take(handle, step, inside)
        return True

    def _capture_due(self, graphs: StepGraphs) -> StepShape | None:
        """Capture what was missed too often, now that it is missed again; None where there is none."""
        shape = graphs.take_due()
        if shape is None:
            return None
        try:
            graphs.capture_late(shape, self.model, self._kv)
        except Exception:
            logger.exception("a step of %s could not be captured and runs as before", shape)
            return None
        return shape

    def _take(self, handle: StepHandle, step: StepOutput, inside: Inside) -> None:
        """Note what a step chose inside, and leave the logits of the other sampled rows to be drawn from."""
        plan, lines = handle.plan, step.lines
        num_top = inside.num_top
        logprobs = None
        if num_top and step.logprobs_BW is not None:
            # Steps that draw have no lines but those of rows, in the order of the plan.
            logprobs = HostCopy(step.logprobs_BW[: len(lines)])
        if NOBODY not in inside.rows:
            # Rows of the plan are in the order of its spans here, or it would hold quiet ones.
            rows = [span.row for span in plan.spans]
            handle.drawn = Drawn(HostCopy(step.drawn), rows, list(lines), [], logprobs, num_top)
            return
        line_of = {span.row: line for span, line in zip(plan.spans, lines, strict=True)}
        drawn = {row: line_of[row] for row in inside.rows if row != NOBODY}
        handle.open_rows = [row for row in plan.sample if row not in drawn]
        sampled = set(plan.sample)
        quiet = [(row, line) for row, line in line_of.items() if row not in sampled]
        if drawn or quiet:
            rows, places = list(drawn), list(drawn.values())
            handle.drawn = Drawn(HostCopy(step.drawn), rows, places, quiet, logprobs, num_top)
        if not handle.open_rows:
            return
        wanted = [line_of[row] for row in handle.open_rows]
        if wanted == list(range(len(wanted))):
            handle.logits_RV = step.logits_BV[: len(wanted)]
        else:
            handle.logits_RV = step.logits_BV.index_select(0, to_device(wanted, torch.int64, self._device))

    def _inside(self, rows: list[int]) -> tuple[Inside, Inside]:
        """Return which sampled rows may get their token inside a step with draws, then in one without."""
        version = self.sampler.version
        last = self._last_inside
        if last is not None and last[0] == version and last[1] == rows:
            return last[2]
        edited = self.processors.among(rows) if len(self.processors) else {}
        sampler, nobody = self.sampler, [NOBODY] * len(rows)
        plain = [row if sampler.is_plain_greedy(row) and row not in edited else NOBODY for row in rows]
        fitting = [row if sampler.fits_a_step(row) and row not in edited else NOBODY for row in rows]
        leads = [row if row != NOBODY and sampler.is_greedy(row) else NOBODY for row in fitting]
        draws = [row if row != lead else NOBODY for row, lead in zip(fitting, leads, strict=True)]
        wanted = {row: sampler.num_top(row) for row in fitting if row != NOBODY}
        num_top = {row: count for row, count in wanted.items() if count >= 0}
        inside = Inside(leads, draws, num_top), Inside(plain, nobody)
        self._last_inside = (version, list(rows), inside)
        return inside

    def _batch(self, plan: StepPlan, inputs: StepInputs) -> ForwardBatch:
        attention_plan = self.backend.plan(query_lens=inputs.query_lens, max_seq_lens=inputs.max_seq_lens)
        attention_plan.tree_T = inputs.tree_T
        if self._shared is not None and is_decode_step(plan) and self._shared.of_step(plan.sample):
            attention_plan.shared = self._shared.views(len(plan.sample))
            self._shared.count()
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
            attention_plan=attention_plan,
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
        return to_device(chosen.tolist(), torch.int64, self._device)

    def sample(self, handle: StepHandle, masks: Tensor | None = None) -> None:
        """Draw the tokens of a launched step's open rows and append them to these, on the device.

        `masks` are theirs, in the order of the plan.
        """
        if handle.logits_RV is None:
            return
        try:
            with torch.inference_mode():
                rows = handle.open_rows
                handle.processed = self.processors.among(rows) if len(self.processors) else {}
                edit = self._processing(handle) if handle.processed else None
                handle.sampled = self.sampler.sample(handle.logits_RV, rows, masks, edit=edit)
                self.rows.append(to_device(rows, torch.int64, self._device), handle.sampled.token_ids_R)
                handle.sampled.start_copy()
        except Exception as error:
            logger.exception("sampling of step %d failed", handle.plan.step_id)
            handle.error = self.describe_fault(error, what="sampling")
        handle.logits_RV = None

    def _processing(self, handle: StepHandle) -> Callable[[Tensor], None]:
        def edit(logits_RV: Tensor) -> None:
            handle.processor_errors = self.processors.apply(logits_RV, handle.open_rows)

        return edit

    @property
    def needs_host_tokens(self) -> bool:
        """Say whether a row here needs the tokens of a step on the host before the next is launched."""
        return len(self.processors) > 0

    def collect(self, handle: StepHandle) -> StepResult:
        """Wait for a step and return what it brought, in host numbers."""
        return read_step(handle)


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
