"""Where does a step's time go, kernel by kernel? One run of a workload under torch's profiler.

It is a run of its own beside those that are measured, since a profiler costs time: shares are what to read
in it. The trace opens in Perfetto (ui.perfetto.dev) and Chrome; the table holds each kernel's time, calls,
share of the step, and, where its bytes are known (`op_bytes.py`), the share of the device's copy speed.
Invariant: the engine is driven from this thread, so that what it calls is seen.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch.profiler import ProfilerActivity

from slipstream.bench.op_bytes import StepBytes, bytes_of
from slipstream.bench.profile_ranges import NATIVE, named_ranges
from slipstream.bench.workload import BenchRequest
from slipstream.core.errors import EngineError
from slipstream.core.plan import StepPlan
from slipstream.core.request import Request
from slipstream.core.sampling_params import SamplingParams
from slipstream.engine.assembly import Assembly

# A trace holds every kernel of every step; this many tokens a request say all there is to say.
MAX_OUTPUT_TOKENS = 16
# What is copied to find a device's ceiling; larger than any cache.
CEILING_BYTES = {"cpu": 256 << 20, "cuda": 1 << 30}
NUM_CEILING_RUNS = 5


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class KernelRow:
    """One kernel, or one op with one set of shapes. Times are its own, without what it calls.

    On a GPU there are both, since only ops have shapes and only kernels show what a captured step runs.
    `share` is of the steps' wall time; `num_bytes` what one call moves at least, `ceiling_share` how much of
    the copy speed that comes to; both None where the bytes are not known.
    """

    kind: Literal["kernel", "op"]
    name: str
    shapes: str
    calls: int
    time_us: float
    share: float
    num_bytes: int | None
    ceiling_share: float | None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Profile:
    """What one profiled run came to. `ranges` are the seconds spent in each named part of the loop."""

    device: str
    wall_s: float
    num_steps: int
    step_bytes: int
    ceiling_bytes_per_s: float
    ranges: dict[str, float]
    rows: list[KernelRow]

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1)


def profile_requests(assembly: Assembly, requests: Sequence[BenchRequest], *, trace: Path) -> Profile:
    """Run a workload, outputs cut short, and write its trace; blocks. The engine must be idle."""
    device = assembly.resolved.device
    ceiling = measure_ceiling(device)
    _run(assembly, requests, "warm-up")
    counted = count_step_bytes(assembly)
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == "cuda" else [])
    profiler = torch.profiler.profile(activities=activities, record_shapes=True)
    with named_ranges(assembly.engine, has_nvtx=device == "cuda"), _watching(assembly, counted), profiler:
        started = time.perf_counter()
        _run(assembly, requests, "profiled")
        if device == "cuda":
            torch.cuda.synchronize()
        wall_s = time.perf_counter() - started
    profiler.export_chrome_trace(str(trace))
    events = profiler.key_averages(group_by_input_shape=True)
    element_bytes = getattr(torch, assembly.resolved.dtype).itemsize
    return Profile(
        device=device,
        wall_s=wall_s,
        num_steps=counted.num_steps,
        step_bytes=counted.total // max(1, counted.num_steps),
        ceiling_bytes_per_s=ceiling,
        ranges=ranges_of(events),
        rows=rows_of(events, wall_s, counted, ceiling, element_bytes=element_bytes),
    )


def measure_ceiling(device: str) -> float:
    """Return the bytes that a copy on the device moves in a second, read and written. Blocks."""
    source = torch.ones(CEILING_BYTES[device] // 4, device=device)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(NUM_CEILING_RUNS):
        started = time.perf_counter()
        target.copy_(source)
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return 2 * source.nbytes / best


def count_step_bytes(assembly: Assembly) -> StepBytes:
    """Return the record of what steps read, its weights filled in."""
    model: Any = assembly.engine.runner.model  # type: ignore[attr-defined]
    is_tied = getattr(model.config, "is_tied", False)
    head = getattr(model, "embedding" if is_tied else "head", None)
    return StepBytes(layer_weights=_bytes_in(model.layers), head_weights=_bytes_in(head))


def _bytes_in(module: torch.nn.Module | None) -> int:
    return 0 if module is None else sum(parameter.nbytes for parameter in module.parameters())


class _watching:  # noqa: N801
    """Counts what each launched plan reads, on the runner's `launch`."""

    def __init__(self, assembly: Assembly, counted: StepBytes) -> None:
        self._runner: Any = assembly.engine.runner
        self._counted = counted
        group = self._runner.groups[0]
        self._token_bytes = len(self._runner.groups) * group.page_bytes // group.block_tokens

    def __enter__(self) -> None:
        self._launch = self._runner.launch
        self._runner.launch = self._count

    def __exit__(self, *exception: object) -> None:
        self._runner.launch = self._launch

    def _count(self, plan: StepPlan) -> Any:
        lengths = [span.len for span in plan.spans]
        contexts = [span.start + span.len for span in plan.spans]
        self._counted.add(lengths, contexts, token_bytes=self._token_bytes)
        return self._launch(plan)


def _run(assembly: Assembly, requests: Sequence[BenchRequest], salt: str) -> None:
    """Submit all requests and drive the engine until nothing is left."""
    engine = assembly.engine
    for place, request in enumerate(requests):
        params = SamplingParams(
            max_tokens=min(request.output_tokens, MAX_OUTPUT_TOKENS),
            ignore_eos=True,
            detokenize=False,
            cache_salt=f"profile-{salt}",
        )
        ids = list(request.prompt_token_ids)
        engine.submit(Request.create(ids, params, assembly.limits, request_id=f"{salt}-{place}"))
    while engine.has_work:
        for event in engine.step():
            if event.error is not None:
                raise EngineError(f"The profiled run failed: {event.error[0]}.")


def ranges_of(events: Any) -> dict[str, float]:
    """Return the seconds in each range of the loop, layers together."""
    found: dict[str, float] = {}
    for event in events:
        if not event.is_user_annotation or event.key.startswith(NATIVE) or _is_device(event):
            continue
        name = "layers" if event.key.startswith("layer ") else event.key
        found[name] = found.get(name, 0.0) + event.cpu_time_total / 1e6
    return found


def rows_of(
    events: Any, wall_s: float, counted: StepBytes, ceiling: float, *, element_bytes: int
) -> list[KernelRow]:
    """Return a row for each op or kernel that took time of the device, the longest first."""
    is_gpu = any(_is_device(event) for event in events)
    found = [_row(event, wall_s, counted, ceiling, element_bytes, is_gpu=is_gpu) for event in events]
    rows = [row for row in found if row is not None]
    return sorted(rows, key=lambda row: -row.time_us)


def _row(
    event: Any, wall_s: float, counted: StepBytes, ceiling: float, element_bytes: int, *, is_gpu: bool
) -> KernelRow | None:
    is_native = event.key.startswith(NATIVE)
    if event.is_user_annotation and not is_native:
        return None
    # A kernel's time is its own; an op's, where there are kernels, that of those which it launched.
    time_us = event.self_device_time_total if is_gpu else event.self_cpu_time_total
    if time_us <= 0:
        return None
    shapes = [list(shape) for shape in event.input_shapes or ()]
    num_bytes = bytes_of(event.key, shapes, element_bytes)
    if num_bytes is None:
        together = counted.bytes_of(event.key)
        num_bytes = None if together is None else together // event.count
    share = None if num_bytes is None else num_bytes * event.count / (time_us * 1e-6) / ceiling
    return KernelRow(
        kind="kernel" if _is_device(event) else "op",
        name=event.key,
        shapes=" ".join("x".join(map(str, shape)) for shape in shapes if shape),
        calls=event.count,
        time_us=time_us,
        share=time_us * 1e-6 / wall_s,
        num_bytes=num_bytes,
        ceiling_share=share,
    )


def _is_device(event: Any) -> bool:
    return event.device_type.name != "CPU"
