"""Is it the real thing? Counters of what ran, and plans executed by hand against transformers.

A step runs every linear once whatever the batch; two plans are outstanding because the runner is fed ahead,
not because a counter says so; siblings compute a shared prefix once.
"""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from slipstream import LLM, KvCacheConfig, SamplingParams
from slipstream.cache.groups import resolve
from slipstream.cache.kv_cache import KvCache
from slipstream.core.cache_group import CacheGroup
from slipstream.core.plan import RequestInit, Span, StepPlan, StepResult
from slipstream.core.request import Request
from slipstream.core.sampling_params import RowSampling
from slipstream.engine.assembly import assemble
from slipstream.engine.config import EngineConfig
from slipstream.engine.engine import Engine
from slipstream.engine.runner import Runner, bind_layers
from slipstream.engine.scheduler import Scheduler
from slipstream.engine.step_handle import StepHandle
from slipstream.layers.embedding import LMHead
from slipstream.layers.linear import Linear
from tests.engine.fake_runner import LIMITS, FakeRunner, Step, full, lone_output
from tests.engine.tiny import (
    anonymous_bytes,
    one_thread,
    prompt_ids,
    smallest_gap,
    tiny_gemma3,
    tiny_llama,
    write_folder,
)

# Catches a hang only.
DEADLINE_S = 60.0


@pytest.fixture(scope="module", autouse=True)
def single_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def llama() -> Any:
    return tiny_llama()


@pytest.fixture(scope="module")
def llama_folder(llama: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(llama, tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module", params=[tiny_llama, tiny_gemma3], ids=["llama", "gemma3"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(request.param(), tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("rows", [1, 32])
def test_every_linear_runs_once_a_step(folder: Path, rows: int) -> None:
    """Weights are read once for all rows: no loop over rows, spans, prompts or samples hides anywhere."""
    calls: Counter[str] = Counter()
    widths: set[int] = set()

    def count(name: str, inputs: tuple[torch.Tensor, ...]) -> None:
        calls[name] += 1
        widths.add(inputs[0].shape[0])

    with LLM(folder, disable_overlap_scheduler=True) as llm:
        model = llm.startup.engine.runner.model
        linears = {n: m for n, m in model.named_modules() if isinstance(m, (Linear, LMHead))}
        for name, module in linears.items():
            module.register_forward_hook(lambda _, inputs, __, name=name: count(name, inputs))
        prompts = [prompt_ids(4 + i, seed=i) for i in range(rows)]
        params = [SamplingParams(max_tokens=12 + i % 3, n=1, ignore_eos=True) for i in range(rows)]
        llm.generate(prompts, params, raise_on_error=True)
        steps = llm.get_stats()["num_plans"]
    assert len(linears) >= 4 * model.config.num_layers + 1
    assert calls == dict.fromkeys(linears, steps)
    # The batch is really one: the prompts in one step, then one token of each row.
    assert {sum(map(len, prompts)), rows} <= widths


class ImpatientRunner(FakeRunner):
    """`collect` of step `hold_id` blocks until the step after it was launched, as a busy device would."""

    def __init__(self, *args: Any, hold_id: int) -> None:
        super().__init__(*args)
        self.hold_id = hold_id
        self.is_next_launched = threading.Event()
        self.is_given_up = threading.Event()

    def launch(self, plan: StepPlan) -> Step:
        if plan.step_id == self.hold_id + 1:
            self.is_next_launched.set()
        return super().launch(plan)

    def collect(self, step: Step) -> StepResult:
        if step.plan.step_id == self.hold_id:
            while not self.is_next_launched.wait(0.01):
                if self.is_given_up.is_set():
                    break
        return super().collect(step)


def overlapped(depth: int) -> tuple[Engine, ImpatientRunner, Request]:
    groups = resolve(full(), block_tokens=8, element_bytes=4)
    scheduler = Scheduler(KvCache(groups, 20), max_batch_size=4, max_num_tokens=64)
    runner = ImpatientRunner(groups, 20, hold_id=5)
    engine = Engine(scheduler, runner, depth=depth)
    request = Request.create([3, 4, 5], SamplingParams(max_tokens=12, seed=7), LIMITS, request_id="r")
    engine.submit(request)
    return engine, runner, request


def drive(engine: Engine) -> tuple[threading.Thread, list[int]]:
    tokens: list[int] = []

    def run() -> None:
        while engine.has_work:
            for event in engine.step():
                tokens.extend(event.new_token_ids)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, tokens


def test_two_plans_are_outstanding_at_depth_two() -> None:
    """Step 5 comes back only once step 6 was launched, whose input token no host knows yet."""
    engine, runner, request = overlapped(2)
    thread, tokens = drive(engine)
    thread.join(DEADLINE_S)
    assert not thread.is_alive()
    assert runner.is_next_launched.is_set()
    assert tokens == lone_output(request)
    assert engine.scheduler.stats.max_outstanding == 2


def test_one_plan_is_outstanding_at_depth_one() -> None:
    """The same runner blocks for ever: what makes the test above pass is the depth."""
    engine, runner, request = overlapped(1)
    thread, tokens = drive(engine)
    thread.join(0.5)
    assert thread.is_alive() and len(tokens) == 5
    runner.is_given_up.set()
    thread.join(DEADLINE_S)
    assert not thread.is_alive()
    assert tokens == lone_output(request)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("prefix", [64, 70])
def test_eight_siblings_compute_one_prefix_and_eight_tails(folder: Path, prefix: int, overlap: bool) -> None:
    start = prompt_ids(prefix, seed=1)
    prompts = [start + prompt_ids(5, seed=10 + i) for i in range(8)]
    with LLM(folder, disable_overlap_scheduler=not overlap) as llm:
        outputs = llm.generate(prompts, SamplingParams(max_tokens=6, ignore_eos=True), raise_on_error=True)
        stats = llm.get_stats()
        block = llm.startup.resolved.kv_cache.tokens_per_block
    decoded = 8 * (6 - 1)
    ideal = prefix + 8 * 5 + decoded
    # What lies in the block that the prefix ends in may be computed again by each sibling, nothing else.
    assert ideal <= stats["executed_tokens"] <= ideal + 7 * (prefix % block)
    assert stats["num_cached_tokens"] == sum(output.num_cached_tokens for output in outputs)
    total = sum(map(len, prompts)) + decoded
    assert stats["executed_tokens"] == total - stats["num_cached_tokens"]


@pytest.fixture
def runner(llama_folder: Path) -> Runner:
    runner = assemble(EngineConfig(model=llama_folder, max_batch_size=4)).engine.runner
    assert isinstance(runner, Runner)
    return runner


def init(row: int, tokens: list[int], pages: list[int], *, computed: int = 0, **sampling: Any) -> RequestInit:
    return RequestInit(
        row=row,
        request_id=f"r{row}",
        tokens=tokens,
        num_prompt=len(tokens),
        num_computed=computed,
        blocks=[pages],
        sampling=RowSampling(**sampling),
        seed=1,
        sample_idx=0,
    )


def execute(runner: Runner, plan: StepPlan) -> StepResult:
    handle = runner.launch(plan)
    runner.sample(handle)
    return runner.collect(handle)


def test_a_plan_by_hand_is_what_transformers_says(runner: Runner, llama: Any) -> None:
    """Pages in any order, a prompt in two chunks, then decoding whose inputs only the device knows."""
    prompt = prompt_ids(40, seed=5)
    first = execute(runner, StepPlan(0, added=[init(2, prompt, [9, 4])], spans=[Span(2, 0, 33)]))
    assert (first.tokens, first.executed_tokens) == ({}, 33)
    plans = [StepPlan(1, spans=[Span(2, 33, 7)], sample=[2])]
    plans += [StepPlan(2 + i, spans=[Span(2, 40 + i, 1)], sample=[2]) for i in range(9)]
    handles: list[StepHandle] = []
    for plan in plans:
        handles.append(runner.launch(plan))
        runner.sample(handles[-1])
    output = [runner.collect(handle).tokens[2][0] for handle in handles]
    assert smallest_gap(llama, prompt, output) > 1e-3


def test_a_row_is_reissued_in_the_plan_that_frees_it(runner: Runner, llama: Any) -> None:
    old, new = prompt_ids(20, seed=6), prompt_ids(11, seed=7)
    execute(runner, StepPlan(0, added=[init(0, old, [3])], spans=[Span(0, 0, 20)], sample=[0]))
    plan = StepPlan(1, removed=[0], added=[init(0, new, [5])], spans=[Span(0, 0, 11)], sample=[0])
    smallest_gap(llama, new, execute(runner, plan).tokens[0])


def test_tokens_go_to_their_rows_in_whatever_order_they_are_sampled(runner: Runner, llama: Any) -> None:
    """Spans come shortest first; `sample` keeps the order of the rows."""
    prompts = [prompt_ids(length, seed=length) for length in (21, 3, 9)]
    added = [init(row, prompt, [row + 1]) for row, prompt in enumerate(prompts)]
    spans = [Span(row, 0, len(prompts[row])) for row in (1, 2, 0)]
    result = execute(runner, StepPlan(0, added=added, spans=spans, sample=[0, 1, 2]))
    for row, prompt in enumerate(prompts):
        smallest_gap(llama, prompt, result.tokens[row])


def test_copied_pages_serve_as_the_prefix_of_another_row(runner: Runner, llama: Any) -> None:
    prompt = prompt_ids(30, seed=8)
    execute(runner, StepPlan(0, added=[init(0, prompt, [3])], spans=[Span(0, 0, 30)], sample=[0]))
    sibling = [*prompt[:25], *prompt_ids(4, seed=9)]
    plan = StepPlan(
        1, added=[init(1, sibling, [7], computed=25)], copies=[(3, 7)], spans=[Span(1, 25, 4)], sample=[1]
    )
    smallest_gap(llama, sibling, execute(runner, plan).tokens[1])


def test_copies_from_the_null_page_zero(runner: Runner) -> None:
    runner.pages[6] = float("nan")
    execute(runner, StepPlan(0, added=[init(0, [9, 8], [6])], copies=[(0, 6)], spans=[Span(0, 0, 2)]))
    assert torch.isfinite(runner.pages[6]).all()
    assert (runner.pages[0] == 0).all()


def test_pages_that_still_hold_nan_fail_nobody_who_does_not_see_them(runner: Runner, llama: Any) -> None:
    """Positions of a page past a row's length are masked in K and in V: 0 x NaN would be NaN."""
    runner.pages[8] = 0.0
    runner.pages[8, :, :, 20:] = float("nan")
    prompt = prompt_ids(12, seed=10)
    plan = StepPlan(0, added=[init(3, prompt, [8])], spans=[Span(3, 0, 12)], sample=[3])
    result = execute(runner, plan)
    assert not result.row_errors
    smallest_gap(llama, prompt, result.tokens[3])


def test_a_bad_row_is_an_entry_beside_its_healthy_mates(
    runner: Runner, monkeypatch: pytest.MonkeyPatch, llama: Any
) -> None:
    prompts = [prompt_ids(6 + row, seed=row) for row in range(3)]
    logits = runner.model.logits

    def poisoned(hidden_RD: torch.Tensor) -> torch.Tensor:
        logits_RV = logits(hidden_RD)
        logits_RV[1, 17] = float("nan")
        return logits_RV

    monkeypatch.setattr(runner.model, "logits", poisoned)
    added = [init(row, prompt, [row + 1]) for row, prompt in enumerate(prompts)]
    spans = [Span(row, 0, len(prompt)) for row, prompt in enumerate(prompts)]
    result = execute(runner, StepPlan(0, added=added, spans=spans, sample=[0, 1, 2]))
    assert list(result.row_errors) == [1] and "NaN" in result.row_errors[1]
    assert result.tokens[1] == []
    for row in (0, 2):
        smallest_gap(llama, prompts[row], result.tokens[row])


def test_a_failing_forward_is_an_entry_of_each_row(
    runner: Runner, monkeypatch: pytest.MonkeyPatch, llama: Any
) -> None:
    def raising(batch: Any) -> torch.Tensor:
        raise RuntimeError("secret detail")

    plan = StepPlan(0, added=[init(0, [9], [1]), init(1, [8], [2])], spans=[Span(0, 0, 1), Span(1, 0, 1)])
    with monkeypatch.context() as patch:
        patch.setattr(runner.model, "forward", raising)
        result = execute(runner, plan)
    assert result.row_errors.keys() == {0, 1} and not result.tokens
    assert "secret" not in str(result.row_errors)
    prompt = prompt_ids(9, seed=3)
    plan = StepPlan(1, removed=[0, 1], added=[init(0, prompt, [1])], spans=[Span(0, 0, 9)], sample=[0])
    smallest_gap(llama, prompt, execute(runner, plan).tokens[0])


def test_logprobs_come_with_the_rows_that_asked(runner: Runner, llama: Any) -> None:
    prompt = prompt_ids(9, seed=3)
    added = [init(0, prompt, [1], logprobs=3), init(1, prompt, [2])]
    result = execute(runner, StepPlan(0, added=added, spans=[Span(0, 0, 9), Span(1, 0, 9)], sample=[0, 1]))
    assert list(result.logprobs) == [0]
    expected = llama(torch.tensor([prompt])).logits[0, -1].log_softmax(-1).topk(3)
    top = result.logprobs[0][0].top
    assert [token for token, _ in top] == expected.indices.tolist()
    # Logits of up to about 100 in float32, summed in another order.
    assert [value for _, value in top] == pytest.approx(expected.values.tolist(), abs=1e-4)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_a_cpu_touches_no_page_before_its_first_use(llama_folder: Path) -> None:
    """A pool of gigabytes costs nothing until tokens are written to it."""
    before = anonymous_bytes()
    kv = KvCacheConfig(max_tokens=400_000)
    assembly = assemble(EngineConfig(model=llama_folder, kv_cache_config=kv))
    grown = anonymous_bytes() - before
    runner = assembly.engine.runner
    assert isinstance(runner, Runner)
    assert runner.pages.nbytes == assembly.capacity.pool_bytes > 250 * 1024**2
    assert grown < runner.pages.nbytes // 4
    assert (runner.pages[0] == 0).all()


def test_layers_are_bound_to_places_of_their_groups() -> None:
    local = CacheGroup(layers=(0, 1, 3, 4), kind="window", heads=1, head_dim=4, window=8)
    groups = resolve(
        [local, CacheGroup(layers=(2, 5), kind="full", heads=1, head_dim=4)], block_tokens=8, element_bytes=4
    )
    assert [group.layers for group in groups] == [(0, 1), (3, 4), (2, 5)]
    assert bind_layers(groups) == [(0, 0), (0, 1), (2, 0), (1, 0), (1, 1), (2, 1)]
