"""Is the worst step run before the cache gets its memory, and does every shortage name figures and a knob?

A device whose memory is counted by hand stands in for a GPU: its free bytes and a step's peak are set.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from slipstream import KvCacheConfig, SamplingParams
from slipstream.core.errors import EngineError, OutOfMemoryError
from slipstream.core.plan import StepPlan
from slipstream.core.request import Request
from slipstream.engine import assembly as assembly_file
from slipstream.engine.assembly import assemble
from slipstream.engine.config import EngineConfig
from slipstream.engine.faults import describe_fault
from slipstream.engine.ledger import HostMemory, Ledger, memory_of, tensor_bytes
from slipstream.engine.runner import Runner
from slipstream.engine.step_shapes import StepShape, StepShapes
from slipstream.engine.warm_up import (
    IN_PLACE,
    NUM_PAGES,
    ODD_ONE,
    StepBounds,
    _measure_graphs,
    worst_step,
)
from tests.bench.tiny_checkpoint import write_checkpoint
from tests.engine.tiny import run_requests

MIB = 1 << 20
BOUNDS = StepBounds(
    max_batch_size=4, max_num_tokens=50, max_seq_len=32, num_groups=2, block_tokens=8, depth=2
)


@dataclasses.dataclass
class CountedMemory:
    """A device of 100 MiB of which other programs have 10; a step takes `step_bytes`, rows `row_bytes`."""

    step_bytes: int = 7 * MIB
    row_bytes: int = 2 * MIB
    total: int = 100 * MIB
    taken: int = 10 * MIB
    can_measure: bool = True
    events: list[str] = dataclasses.field(default_factory=list)

    def free(self) -> int:
        return self.total - self.taken

    def held(self) -> int:
        self.events.append("held")
        return self.row_bytes * (self.events.count("held") - 1)

    def outside(self) -> int:
        return self.taken

    def start(self) -> None:
        self.events.append("start")

    def growth(self) -> int:
        self.events.append("growth")
        return self.step_bytes

    def settle(self) -> None:
        self.events.append("settle")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("tiny"))


def start(
    folder: Path, memory: CountedMemory, monkeypatch: pytest.MonkeyPatch, **options: Any
) -> tuple[Any, list[StepPlan]]:
    """Assemble over that memory; also returns the plans that ran meanwhile."""
    plans: list[StepPlan] = []
    launch = Runner.launch

    def watched(self: Runner, plan: StepPlan) -> Any:
        plans.append(plan)
        return launch(self, plan)

    monkeypatch.setattr(assembly_file, "memory_of", lambda device: memory)
    monkeypatch.setattr(Runner, "launch", watched)
    sizes = {"max_batch_size": 6, "max_num_tokens": 200, "max_seq_len": 256} | options
    return assemble(EngineConfig(model=str(folder), **sizes)), plans


@pytest.mark.parametrize("is_context_free", [False, True])
@pytest.mark.parametrize("max_num_tokens", [4, 5, 6, 37, 50, 129])
@pytest.mark.parametrize("max_batch_size", [1, 3, 4])
def test_the_worst_step_fills_every_bound(
    max_num_tokens: int, max_batch_size: int, is_context_free: bool
) -> None:
    bounds = dataclasses.replace(
        BOUNDS,
        max_num_tokens=max_num_tokens,
        max_batch_size=max_batch_size,
        is_context_free=is_context_free,
    )
    plan = worst_step(bounds)
    assert plan.num_tokens == min(max_num_tokens, max_batch_size * bounds.max_seq_len)
    assert plan.sample == [span.row for span in plan.spans] == list(range(max_batch_size))
    lengths = [span.len for span in plan.spans]
    # One-token rows come first, and what is longer is as long as it can be.
    assert lengths == sorted(lengths) or max(lengths) == bounds.max_seq_len
    assert lengths.index(max(lengths)) >= lengths.count(1) or max(lengths) == 1
    for init, span in zip(plan.added, plan.spans, strict=True):
        # One-token rows name a bound alone; a chunk stands at the end of its context.
        is_chunk = span.len > 1
        end = span.len if is_chunk and is_context_free else bounds.max_seq_len
        assert span.start + span.len == end and len(init.tokens) == (end if is_chunk else 1)
        assert len(init.blocks) == bounds.num_groups
        assert {page for group in init.blocks for page in group} == {1}
        assert init.sampling == (IN_PLACE if init.row else ODD_ONE)
    assert {row for row, *_ in plan.logits} == {span.row for span in plan.spans if span.len > 1}


class Capturing:
    """Captures into a pool of 30 MiB a kind; the first capture of a shape loads 50 MiB of code besides."""

    def __init__(self, memory: CountedMemory) -> None:
        self.counters = {"graph_bytes": 0}
        self.shapes: list[StepShape] = []
        self._memory = memory
        self.describe_fault = describe_fault

    def capture(self, shape: StepShape) -> object:
        is_first = shape not in self.shapes
        self.shapes.append(shape)
        self.counters["graph_bytes"] += 30 * MIB if is_first else 0
        self._memory.taken += 53 * MIB if is_first else 3 * MIB
        return object()


SHAPES = StepShapes.create((1, 2, 8), has_padding=True, max_num_tokens=128, max_seq_len=40)


def test_graphs_cost_their_pool_and_a_driver_share_each() -> None:
    """Code is loaded once, and so not counted for every later one."""
    memory = CountedMemory()
    runner = Capturing(memory)
    taken = _measure_graphs(runner, memory, SHAPES)  # type: ignore[arg-type]
    # Three sizes, prompts of 16, 32 and 40 alone, and 8 rows beside one prompt or eight of 64 or 128 tokens.
    assert len(SHAPES) == 3 + 3 + 2 * 2
    assert taken == (3 * 30 + 3 * 10) * MIB
    assert runner.shapes == 2 * [StepShape(8), StepShape(8, 8, 128), StepShape(0, 1, 40)]


def test_a_capture_that_does_not_fit_is_refused_with_the_knob(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Capturing, shape: StepShape) -> None:
        raise torch.OutOfMemoryError("Tried to allocate 3.00 GiB. GPU 0 of which 1.00 GiB is free.")

    monkeypatch.setattr(Capturing, "capture", full)
    memory = CountedMemory()
    with pytest.raises(OutOfMemoryError, match=r"3\.00 GiB needed") as refused:
        _measure_graphs(Capturing(memory), memory, SHAPES)  # type: ignore[arg-type]
    assert "CudaGraphConfig(max_batch_size=...)" in str(refused.value)
    assert f"{90 * MIB:,} bytes are free without it" in str(refused.value)


def test_the_pool_gets_what_the_worst_step_leaves(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = CountedMemory()
    assembly, plans = start(
        folder,
        memory,
        monkeypatch,
        kv_cache_config=KvCacheConfig(max_tokens=512),
        disable_overlap_scheduler=False,
    )
    ledger = assembly.ledger
    assert (ledger.state_bytes, ledger.workspace_bytes, ledger.graph_bytes) == (2 * MIB, 7 * MIB, 0)
    assert ledger.kv_bytes == assembly.capacity.pool_bytes and ledger.weight_bytes == assembly.weight_bytes
    # As many of the largest steps as are ever outstanding, each of every token and every row.
    assert [plan.num_tokens for plan in plans] == [200, 200] and len(plans[0].spans) == 6
    assert memory.events[-1] == "settle" and memory.events.index("start") < memory.events.index("growth")
    line = next(line for line in assembly.report if line.startswith("memory: "))
    assert f"workspace of a step {7 * MIB:,} bytes" in line and f"free {ledger.free_bytes:,} of" in line
    # What the warm-up left behind reaches no request.
    params = SamplingParams(max_tokens=5, ignore_eos=True)
    request = Request.create([1, 2, 3], params, assembly.limits, request_id="a")
    first = run_requests(assembly.engine, [request])
    monkeypatch.undo()
    plain = assemble(EngineConfig(model=str(folder), max_batch_size=6, max_num_tokens=200, max_seq_len=256))
    again = run_requests(plain.engine, [Request.create([1, 2, 3], params, plain.limits, request_id="a")])
    assert first == again and plain.ledger.workspace_bytes is None


@pytest.mark.parametrize(
    ("memory", "complaint"),
    [
        (
            CountedMemory(total=10 * MIB),
            r"The weights need ([\d,]+) bytes in float32, and 0 of 10,485,760 are free",
        ),
        (
            CountedMemory(step_bytes=95 * MIB),
            r"needs at least ([\d,]+) bytes \(one block\) and has 0 .*As it stands, memory: weights "
            r".*workspace of a step 99,614,720 bytes",
        ),
    ],
)
def test_too_little_memory_at_start_names_the_figures(
    folder: Path, memory: CountedMemory, complaint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        assembly_file, "fit_capacity", lambda resolved, **given: assembly_fit(as_gpu(resolved), **given)
    )
    with pytest.raises(OutOfMemoryError) as refused:
        start(folder, memory, monkeypatch)
    found = re.search(complaint, str(refused.value))
    assert found, refused.value
    assert int(found.group(1).replace(",", "")) > 0


assembly_fit = assembly_file.fit_capacity


def as_gpu(resolved: Any) -> Any:
    """The rules for a GPU's memory, over the counted one."""
    return dataclasses.replace(resolved, device="cuda")


def test_a_worst_step_that_does_not_fit_is_refused_with_the_knob(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any) -> None:
        raise torch.OutOfMemoryError("Tried to allocate 3.00 GiB. GPU 0 of which 1.00 GiB is free.")

    monkeypatch.setattr(Runner, "_forward", full)
    with pytest.raises(OutOfMemoryError) as refused:
        start(folder, CountedMemory(), monkeypatch)
    message = str(refused.value)
    assert "3.00 GiB needed and 1.00 GiB free; lower max_num_tokens or max_batch_size" in message
    assert f"{90 * MIB:,} bytes are free without it" in message


def test_a_worst_step_that_fails_otherwise_stops_the_start(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: Any) -> None:
        raise ValueError

    monkeypatch.setattr(Runner, "_forward", broken)
    with pytest.raises(EngineError, match="warm-up failed: the step failed: ValueError"):
        start(folder, CountedMemory(), monkeypatch)


def test_a_shortage_in_service_brings_the_ledger(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assembly, _ = start(folder, CountedMemory(), monkeypatch)
    told = assembly.engine.runner.describe_fault(torch.OutOfMemoryError("Tried to allocate 1.00 GiB"))
    assert told == describe_fault(
        torch.OutOfMemoryError("Tried to allocate 1.00 GiB"), ledger=assembly.ledger
    )
    assert told.startswith("the step failed: out of memory, 1.00 GiB needed;")
    assert told.endswith(f". At start, {assembly.ledger.line()}")


def test_a_ledger_adds_up() -> None:
    entries = {"other_bytes": 1, "weight_bytes": 20, "state_bytes": 3, "graph_bytes": 4, "kv_bytes": 50}
    ledger = Ledger(device="cuda", total_bytes=100, workspace_bytes=5, **entries)
    assert ledger.free_bytes == 17 and "captured steps 4 bytes" in ledger.line()
    unmeasured = dataclasses.replace(ledger, workspace_bytes=None, graph_bytes=0)
    assert unmeasured.free_bytes == 26 and "captured" not in unmeasured.line()
    assert "workspace of a step not measured on this device" in unmeasured.line("9 tokens: because")
    assert "(9 tokens: because)" in unmeasured.line("9 tokens: because")


def test_tensors_are_counted_once() -> None:
    class Owner:
        def __init__(self) -> None:
            self.table = torch.zeros(4, 8)
            self.view = self.table[1:]
            self.name = "x"

    assert tensor_bytes(Owner(), Owner()) == 2 * 4 * 8 * 4


def test_a_host_has_memory() -> None:
    memory = memory_of(torch.device("cpu"))
    assert isinstance(memory, HostMemory) and not memory.can_measure
    assert 0 < memory.free() < memory.total and memory.outside() < memory.total
    assert memory.growth() == memory.held() == 0 and NUM_PAGES == 2


@pytest.mark.gpu
def test_no_load_exceeds_what_was_reserved_on_a_gpu(folder: Path) -> None:
    """Everything at once for as long as it takes: the allocator never reserves more than the ledger says."""
    sizes = {"max_batch_size": 64, "max_num_tokens": 2048, "max_seq_len": 4096}
    cache = KvCacheConfig(free_gpu_memory_fraction=0.3)
    config = EngineConfig(model=str(folder), device="cuda", dtype="bfloat16", kv_cache_config=cache, **sizes)
    assembly = assemble(config)
    ledger = assembly.ledger
    assert ledger.workspace_bytes and ledger.state_bytes and ledger.graph_bytes
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    params = SamplingParams(
        max_tokens=40, temperature=1.0, top_p=0.9, top_k=50, logprobs=20, prompt_logprobs=20,
        repetition_penalty=1.1, ignore_eos=True, seed=1,
    )  # fmt: skip
    lengths = [3000, *(17 * i % 900 + 1 for i in range(80))]
    requests = [
        Request.create([i % 250 for i in range(n)], params, assembly.limits, request_id=f"r{k}")
        for k, n in enumerate(lengths)
    ]
    outputs = run_requests(assembly.engine, requests)
    assert len(outputs) == len(lengths) and all(len(tokens) == 40 for tokens in outputs.values())
    taken = torch.cuda.max_memory_allocated() - before
    assert taken <= ledger.workspace_bytes + ledger.graph_bytes, f"{taken:,} of {ledger.line()}"
