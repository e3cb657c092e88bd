# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""How does a step run without the host naming its kernels? Captured once per shape, then replayed.

A captured step holds everything from the look-up of tokens, positions and pages to the logits, and for rows
that take the greatest one the choice of the token and its place in the row too; steps with draws are captured
apart, and hold those of rows that draw, have penalties or want logprobs. The host writes one line of
numbers and replays; unused lines and tokens of a shape have the number -1 and touch nothing.
Shapes are captured before the engine is ready or while nothing runs, those that were missed first; until
then a larger one serves, or the step runs kernel by kernel. Only where sizes are not padded is a shape
captured when it is met.
Invariant: a replay computes what the same step would kernel by kernel; nothing here waits for the device but
a capture. Captured addresses are the rows', the pages' and the weights': whoever replaces one of these calls
`forget`.
B lines of a step: R one-token rows, then P longer spans; T tokens of these, G cache groups, V vocabulary.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import logging
import time
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from typing import Any

import torch
from torch import Tensor

from slipstream.attention.base import AttentionBackend, AttentionPlan
from slipstream.core.batch import ForwardBatch
from slipstream.core.plan import StepPlan
from slipstream.engine.packed_step import Inside, Layout, PackedViews, lines_of
from slipstream.engine.rows import Rows
from slipstream.engine.shared_rows import SharedRows
from slipstream.engine.step_shapes import StepShape, StepShapes, shape_needed
from slipstream.kernels.decode_inputs import decode_inputs_op
from slipstream.kernels.greedy_append import greedy_append_op
from slipstream.kernels.query_tiles import TILES, tile_queries
from slipstream.kernels.span_inputs import span_inputs_op
from slipstream.sampling.step_draws import WIDTH as LOGPROBS_WIDTH
from slipstream.sampling.step_draws import StepDraws

# The pages of each group, and where a layer finds its own: (group, place in the page).
KvPlaces = tuple[list[Tensor], list[tuple[int, int]]]

logger = logging.getLogger(__name__)

# What a step loses that runs in a larger shape or kernel by kernel, and what a capture takes: a millisecond
# or two, some tens, and less than a hundred.
PADDED, PLAIN, WORTH = 1, 16, 32


@dataclasses.dataclass(slots=True)
class Captured:
    """One captured step: logits [B, V], and what was drawn and judged [3, B], in a step with draws logprobs
    [B, W] too (see `StepOutput`)."""

    graph: Any
    logits_BV: Tensor
    drawn_3B: Tensor
    logprobs_BW: Tensor | None = None


@dataclasses.dataclass(slots=True)
class StepOutput:
    """What a replayed or native step left, until the next one: a line for each row, in a shape's order.

    `drawn` holds token ids and statuses of the lines that were chosen inside, and (of steps with prompts)
    whether a line's hidden state is finite; `logprobs_BW` those of lines that want some, as
    `StepDraws.run` leaves them. `lines` are those of the plan's spans, in their order.
    """

    logits_BV: Tensor
    drawn: Tensor
    lines: Sequence[int]
    logprobs_BW: Tensor | None = None


class Borrowed:
    """A tensor of a captured step without its memory, which the next capture may have too.

    Steps run one after another and what one leaves is read before the next, so they can all leave it in the
    same place. The protocol is numba's `__cuda_array_interface__`, version 3.
    """

    def __init__(self, tensor: Tensor) -> None:
        size = tensor.element_size()
        self.__cuda_array_interface__ = {
            "shape": tuple(tensor.shape),
            "strides": tuple(stride * size for stride in tensor.stride()),
            "typestr": f"<f{size}",
            "data": (tensor.data_ptr(), False),
            "version": 3,
        }


@functools.cache
def capture_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream of all captures: memory of their pool, and the products' own, is kept by stream."""
    return torch.cuda.Stream(device)


@contextlib.contextmanager
def collector_off() -> Generator[None]:
    """Keep Python from collecting cycles for a while."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


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

    def run(self, step: Callable[[], tuple[Tensor, Tensor]]) -> Captured:
        """Run a step, so that every kernel is loaded, then capture it. Blocks.

        Steps share the pool, since only one runs at a time and what it leaves is read before the next.
        """
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        step()
        torch.cuda.synchronize(self._device)
        before = torch.cuda.memory_reserved(self._device)
        try:
            made = self._record(step)
        except torch.OutOfMemoryError:
            made = None
        if made is None:
            # What is cached cannot be given back in the middle of a capture.
            torch.cuda.empty_cache()
            before = torch.cuda.memory_reserved(self._device)
            made = self._record(step)
        graph, logits_BV, drawn_3B = made
        self.num_captures += 1
        self.num_bytes += torch.cuda.memory_reserved(self._device) - before
        return Captured(graph, torch.as_tensor(Borrowed(logits_BV), device=self._device), drawn_3B)

    def _record(self, step: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Any, Tensor, Tensor]:
        """Capture a step whose kernels are loaded.

        Not by torch.cuda.graph, which gives back all cached memory, pinned memory too, at every capture. A
        graph that the collector finds meanwhile must not be destroyed in the middle of this one.
        """
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(capture_stream(self._device)), collector_off():
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                logits_BV, drawn_3B = step()
            finally:
                graph.capture_end()
        return graph, logits_BV, drawn_3B


@dataclasses.dataclass(slots=True)
class StaticInputs:
    """What every captured step reads and writes, at addresses that stay; sliced to the shape of a step."""

    packed: Tensor
    token_ids: Tensor
    positions: Tensor
    seq_lens_B: Tensor
    slots: Tensor
    table_GBC: Tensor
    drawn: Tensor
    count: Tensor
    logprobs_BW: Tensor

    @classmethod
    def create(cls, shapes: StepShapes, layout: Layout, rows: Rows) -> StaticInputs:
        groups, _, blocks = rows.block_table.shape
        largest = shapes.largest()
        lines = max(shape.lines for shape in largest)
        tokens = max(shape.num_tokens for shape in largest)

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=rows.tokens.device)

        return cls(
            packed=zeros(max(sum(layout.sizes(shape)) for shape in largest)),
            token_ids=zeros(tokens),
            positions=zeros(tokens),
            seq_lens_B=zeros(lines),
            slots=zeros(groups * tokens),
            table_GBC=zeros(groups, lines, blocks, dtype=torch.int32),
            drawn=zeros(3 * lines),
            count=torch.arange(tokens + 1, device=rows.tokens.device),
            logprobs_BW=zeros(lines if shapes.draws else 0, LOGPROBS_WIDTH, dtype=torch.float64),
        )


class StepGraphs:
    """Captured steps by shape. One engine's, on one CUDA device."""

    # Which rows get their token inside is said row by row.
    is_per_row = True

    def __init__(
        self,
        capture: GraphCapture,
        rows: Rows,
        backend: AttentionBackend,
        shapes: StepShapes,
        *,
        max_seq_len: int,
        dtype: torch.dtype,
        shared: SharedRows | None = None,
        draws: StepDraws | None = None,
    ) -> None:
        assert draws is not None or not shapes.draws, "these shapes draw, and nothing here can"
        self._capture, self._rows, self._backend, self._shapes = capture, rows, backend, shapes
        self._shared, self._draws = shared, draws
        self._max_seq_len = max_seq_len
        self._layout = Layout(tile_queries=tile_queries(dtype), tiles_rows=backend.capability.batch_invariant)
        self._inputs: StaticInputs | None = None
        self._captured: dict[StepShape, Captured] = {}
        # What plans have lost that would have run in a shape that was not there, and the one to capture now.
        self._wanted: Counter[StepShape] = Counter()
        self._due: StepShape | None = None
        self._failed: set[StepShape] = set()
        self._last_rows: tuple[StepShape, list[int], Inside] | None = None
        self.num_late_captures = 0

    def forget(self) -> None:
        """Let go of everything captured and its memory."""
        self._captured.clear()
        self._failed.clear()
        self._due = None
        self._inputs, self._last_rows = None, None

    def shape_of(self, plan: StepPlan, *, draws: bool = False) -> StepShape | None:
        """Return the shape that serves a plan, or None where it has to run kernel by kernel.

        With `draws` some of its rows need a step with draws to get their token inside, and get it outside
        where there is none.
        """
        need = shape_needed(plan)
        if need is None:
            return None
        if not need.prompts:
            is_alike = self._shared is not None and self._shared.of_step(plan.sample)
            need = need._replace(shared=is_alike, draws=draws)
        best = found = None
        for shape in self._shapes.serving(need):
            best = best or shape
            if shape in self._captured:
                found = shape
                break
            if not self._shapes.has_padding:
                return best
        if best is not None and found != best and best not in self._failed:
            self._wanted[best] += PLAIN if found is None else PADDED
            if self._wanted[best] >= WORTH:
                self._due = best
        return found

    def take_due(self) -> StepShape | None:
        """Return the shape that was missed so often that its capture pays now, once."""
        due, self._due = self._due, None
        return due

    @property
    def is_missing(self) -> bool:
        """Say whether `missing` would return any."""
        return self._shapes.has_padding and len(self._captured) + len(self._failed) < len(self._shapes)

    def missing(self) -> list[StepShape]:
        """Return the shapes to capture before they are met: the most missed, then the most useful first."""
        if not self._shapes.has_padding:
            return []
        there = self._captured.keys() | self._failed
        missing = [shape for shape in self._shapes.in_order() if shape not in there]
        return sorted(missing, key=lambda shape: -self._wanted[shape])

    def capture(self, shape: StepShape, model: Any, kv: KvPlaces) -> Captured:
        """Capture a step of nobody's rows; blocks. A shape that fails is not missed again before `forget`."""
        started = time.monotonic()
        if shape.draws and self._draws is not None:
            self._draws.prepare()
        self._write(shape, self._pack(shape))
        if self._shared is not None and shape.shared:
            # Nobody's rows share nothing.
            self._shared.forget_step()
        self._failed.add(shape)
        made = self._capture.run(lambda: self._step(shape, model, kv))
        self._failed.discard(shape)
        if shape.draws and self._inputs is not None:
            made.logprobs_BW = self._inputs.logprobs_BW
        self._captured[shape] = made
        logger.debug("captured %s in %.3f s", shape, time.monotonic() - started)
        return made

    def capture_late(self, shape: StepShape, model: Any, kv: KvPlaces) -> Captured:
        """Capture a step that requests wait for."""
        self.num_late_captures += 1
        return self.capture(shape, model, kv)

    def launch(
        self, plan: StepPlan, shape: StepShape, model: Any, kv: KvPlaces, *, inside: Inside
    ) -> StepOutput:
        """Replay the step for the plan's spans; the tensors returned hold until the next launch.

        `inside` says, by span, which rows get their token in the step.
        """
        captured = self._captured.get(shape)
        if captured is None:
            captured = self.capture_late(shape, model, kv)
        if self._shared is not None and shape.shared:
            self._shared.of_step(plan.sample)
            self._shared.count()
        if shape.draws and self._draws is not None:
            self._draws.prepare()
        if shape.prompts:
            self._write(shape, self._layout.pack_spans(shape, plan.spans, inside))
            lines: Sequence[int] = lines_of(shape, plan.spans)
        else:
            self._write_rows(shape, plan.sample, inside)
            lines = range(len(plan.sample))
        captured.graph.replay()
        self._capture.num_replays += 1
        return StepOutput(captured.logits_BV, captured.drawn_3B, lines, captured.logprobs_BW)

    def _pack(self, shape: StepShape) -> Any:
        if shape.prompts:
            return self._layout.pack_spans(shape, [], Inside.nobody(0))
        return self._layout.pack_rows(shape, [], Inside.nobody(0))

    def _write_rows(self, shape: StepShape, rows: list[int], inside: Inside) -> None:
        """Write a step of one-token rows, unless it is the last one's."""
        if self._last_rows is not None and self._last_rows == (shape, rows, inside):
            return
        self._write(shape, self._layout.pack_rows(shape, rows, inside))
        self._last_rows = (shape, list(rows), inside)

    def _write(self, shape: StepShape, host: Any) -> None:
        if self._inputs is None:
            self._inputs = StaticInputs.create(self._shapes, self._layout, self._rows)
        packed = torch.from_numpy(host)
        if self._inputs.packed.is_cuda:
            # From ordinary memory the copy could wait for the steps before it.
            packed = packed.pin_memory()
        self._inputs.packed[: len(host)].copy_(packed, non_blocking=True)
        self._last_rows = None

    def _step(self, shape: StepShape, model: Any, kv: KvPlaces) -> tuple[Tensor, Tensor]:
        """Run a whole step from and into the static tensors."""
        inputs, rows = self._inputs, self._rows
        assert inputs is not None
        views = PackedViews.of(inputs.packed, shape, self._layout)
        batch = self._batch(shape, views, kv)
        hidden_TD = model.forward(batch)
        hidden_BD = hidden_TD.index_select(0, batch.logits_idx) if shape.prompts else hidden_TD
        logits_BV = model.logits(hidden_BD)
        drawn_3B = inputs.drawn[: 3 * shape.lines].view(3, shape.lines)
        places = (rows.tokens, rows.lengths, drawn_3B[:2])
        if views.inside_2B is None:
            greedy_append_op(logits_BV, views.plan_3B[2], *places)
        else:
            assert self._draws is not None
            logprobs_BW = inputs.logprobs_BW[: shape.lines]
            self._draws.run(logits_BV, views.inside_2B, *places, logprobs_BW)
        if shape.prompts:
            # A piece of a prompt is not sampled, and what it wrote may be reused: it is judged here.
            drawn_3B[2] = hidden_BD.isfinite().all(dim=1)
        return logits_BV, drawn_3B

    def _batch(self, shape: StepShape, views: PackedViews, kv: KvPlaces) -> ForwardBatch:
        """Look up everything the forward reads, on the device."""
        inputs, rows = self._inputs, self._rows
        assert inputs is not None
        num_rows, lines, total = shape.rows, shape.lines, shape.num_tokens
        groups = rows.block_table.shape[0]
        plan_2B = views.plan_3B[:2]
        token_ids_T, positions_T = inputs.token_ids[:total], inputs.positions[:total]
        seq_lens_B, table_GBC = inputs.seq_lens_B[:lines], inputs.table_GBC[:, :lines]
        slots_GT = inputs.slots[: groups * total].view(groups, total)
        tables = (rows.tokens, rows.lengths, rows.block_table, rows.block_tokens)
        if num_rows:
            targets = (token_ids_T[:num_rows], positions_T[:num_rows], seq_lens_B[:num_rows])
            decode_inputs_op(
                plan_2B[:, :num_rows], *tables, *targets, slots_GT[:, :num_rows], table_GBC[:, :num_rows]
            )
        row_of_T, query_start = inputs.count[:total], inputs.count[: lines + 1]
        logits_idx = inputs.count[:lines]
        if shape.prompts:
            assert views.query_start is not None and views.line_T is not None
            query_start = views.query_start
            tokens, _, block_table, page_tokens = tables
            span_inputs_op(
                plan_2B,
                query_start,
                views.line_T,
                tokens,
                block_table,
                page_tokens,
                token_ids_T[num_rows:],
                positions_T[num_rows:],
                seq_lens_B[num_rows:],
                slots_GT[:, num_rows:],
                table_GBC[:, num_rows:],
            )
            row_of_T = torch.cat((row_of_T[:num_rows], views.line_T.clamp(min=0)))
            # A line without tokens has no last one: any will do.
            logits_idx = (query_start[1:] - 1).clamp(min=0)
        kv_pages, layer_place = kv
        return ForwardBatch(
            token_ids_T=token_ids_T,
            positions_kT=positions_T[None],
            row_of_T=row_of_T,
            query_start=query_start,
            seq_lens=seq_lens_B,
            slot_mapping_T=list(slots_GT),
            block_table=list(table_GBC),
            kv_pages=kv_pages,
            layer_place=layer_place,
            attention_plan=self._plan(shape, views),
            logits_idx=logits_idx,
        )

    def _plan(self, shape: StepShape, views: PackedViews) -> AttentionPlan:
        """Return a plan of bounds alone; where its tiles begin is read on the device."""
        longest = self._max_seq_len
        query_lens = [1] * shape.rows + [min(shape.tokens, longest)] * shape.prompts
        plan = self._backend.plan(query_lens=query_lens, max_seq_lens=[longest] * shape.lines)
        if views.tiles_M2 is not None:
            plan.step_cache[TILES] = views.tiles_M2.to(torch.int32)
        if self._shared is not None and shape.shared:
            plan.shared = self._shared.views(shape.rows)
        return plan
