# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""How much memory does the worst step take? It is run, before the KV cache gets what is left.

The worst step holds as many requests as a step may, all sampled with everything that sampling can be asked
for, beside the longest chunk at the end of the longest context, whose prompt's log-probabilities are wanted;
as many such steps are outstanding as the engine ever has. On a GPU the largest steps of each kind are
captured too, since captured steps keep their memory.
Invariant: pages do not matter, so all tokens share one; the runner is another's, made for this and dropped.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import msgspec
import torch

from slipstream.core.errors import EngineError, OutOfMemoryError
from slipstream.core.plan import RequestInit, Span, StepPlan
from slipstream.core.sampling_params import RowSampling
from slipstream.engine.ledger import DeviceMemory
from slipstream.engine.runner import Runner
from slipstream.engine.step_shapes import StepShapes

# The null page and one for everybody.
NUM_PAGES = 2
SHARED_PAGE = 1
EVERYTHING = RowSampling(
    temperature=1.0,
    top_k=50,
    top_p=0.9,
    min_p=0.01,
    repetition_penalty=1.1,
    presence_penalty=0.1,
    frequency_penalty=0.1,
    logprobs=20,
    prompt_logprobs=20,
)
# Rows that draw in two ways, and one that wants no logprobs: none can be served in place, logits are copied.
IN_PLACE = msgspec.structs.replace(EVERYTHING, top_k=0)
ODD_ONE = msgspec.structs.replace(EVERYTHING, logprobs=-1)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class StepBounds:
    """How large a step may get. `is_context_free` says that a longer context takes time, but no memory."""

    max_batch_size: int
    max_num_tokens: int
    max_seq_len: int
    num_groups: int
    block_tokens: int
    depth: int
    is_context_free: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """What the worst steps took, in bytes: rows and sampling's state, one step's own, all captured steps."""

    state_bytes: int
    workspace_bytes: int
    graph_bytes: int

    @property
    def num_bytes(self) -> int:
        return self.state_bytes + self.workspace_bytes + self.graph_bytes


def worst_step(bounds: StepBounds, *, step_id: int = 0) -> StepPlan:
    """Return the step that takes the most memory: one-token rows first, then rows of long chunks."""
    num_rows = min(bounds.max_batch_size, bounds.max_num_tokens)
    plan = StepPlan(step_id, removed=list(range(num_rows)) if step_id else [])
    chunks = _chunks(bounds, num_rows)
    for row in range(num_rows - len(chunks)):
        plan.added.append(_request(bounds, row, num_tokens=1, num_computed=0))
        # An upper bound: backends plan for a context of this length.
        plan.spans.append(Span(row, bounds.max_seq_len - 1, 1))
    for row, length in enumerate(chunks, start=num_rows - len(chunks)):
        start = 0 if bounds.is_context_free else bounds.max_seq_len - length
        plan.added.append(_request(bounds, row, num_tokens=start + length, num_computed=start))
        plan.spans.append(Span(row, start, length))
        plan.logits.append((row, start, length, "prompt_logprobs"))
    plan.sample = [span.row for span in plan.spans]
    return plan


def _chunks(bounds: StepBounds, num_rows: int) -> list[int]:
    """Return the lengths of the chunks that fill a step beside one-token rows, as few as can be."""
    chunks: list[int] = []
    while len(chunks) < num_rows:
        # The rows that stay without a chunk take a token each.
        left = bounds.max_num_tokens - sum(chunks) - (num_rows - len(chunks) - 1)
        if left < 2:
            break
        chunks.append(min(left, bounds.max_seq_len))
    return chunks


def _request(bounds: StepBounds, row: int, *, num_tokens: int, num_computed: int) -> RequestInit:
    num_blocks = -(-num_tokens // bounds.block_tokens)
    return RequestInit(
        row=row,
        request_id=f"warm-up-{row}",
        tokens=[0] * num_tokens,
        num_prompt=num_tokens,
        num_computed=num_computed,
        blocks=[[SHARED_PAGE] * num_blocks for _ in range(bounds.num_groups)],
        sampling=IN_PLACE if row else ODD_ONE,
        seed=row,
        sample_idx=0,
    )


def measure_worst_case(
    make_runner: Callable[[], Runner],
    memory: DeviceMemory,
    bounds: StepBounds,
    *,
    shapes: StepShapes,
) -> Measured:
    """Run the worst steps on a runner of `NUM_PAGES` pages and return what they took; blocks.

    `shapes` are what the engine may come to capture. Raises OutOfMemoryError where a step does not fit beside
    the weights, EngineError where it fails otherwise.
    """
    memory.settle()
    held = memory.held()
    runner = make_runner()
    state_bytes = memory.held() - held
    memory.start()
    _run_outstanding(runner, [worst_step(bounds, step_id=i) for i in range(bounds.depth)], memory)
    workspace_bytes = memory.growth()
    graph_bytes = _measure_graphs(runner, memory, shapes) if len(shapes) else 0
    del runner
    memory.settle()
    return Measured(state_bytes=state_bytes, workspace_bytes=workspace_bytes, graph_bytes=graph_bytes)


def _measure_graphs(runner: Runner, memory: DeviceMemory, shapes: StepShapes) -> int:
    """Capture the largest steps; return their pool, and for every graph to come what the driver takes.

    The first captures also load kernels, which all others have then: so the share of one is that of another
    capture of the same step. Graphs are held until the end, or the driver would use their memory again.
    """
    pool = runner.counters["graph_bytes"]
    try:
        held = [runner.capture(shape) for shape in shapes.largest()]
        before = memory.outside()
        held += [runner.capture(shape) for shape in shapes.largest()]
    except torch.OutOfMemoryError as error:
        raise OutOfMemoryError(
            f"The largest captured step does not fit beside the weights: {runner.describe_fault(error)}; "
            f"{memory.free():,} bytes are free without it. Lower CudaGraphConfig(max_batch_size=...)."
        ) from error
    each = max(0, memory.outside() - before) // len(shapes.largest())
    taken = runner.counters["graph_bytes"] - pool + each * len(shapes)
    held.clear()
    return taken


def _run_outstanding(runner: Runner, plans: list[StepPlan], memory: DeviceMemory) -> None:
    handles = []
    for plan in plans:
        handle = runner.launch(plan)
        runner.sample(handle)
        handles.append(handle)
    for handle in handles:
        runner.collect(handle)
        if handle.error is None:
            continue
        if "out of memory" in handle.error:
            raise OutOfMemoryError(
                f"The largest step does not fit beside the weights: {handle.error}; "
                f"{memory.free():,} bytes are free without it."
            )
        raise EngineError(f"The engine's warm-up failed: {handle.error}.")
