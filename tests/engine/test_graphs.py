"""Is a replayed step the step it was captured from, for every request, size and change of weights?

Whatever is decided on the host is tested anywhere, over steps that run again instead of being replayed;
replaying itself needs one CUDA device. Tokens are compared in float32 with TF32 off, on the prompts of law 1.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from slipstream import LLM, CudaGraphConfig, KvCacheConfig, SamplingParams
from slipstream.attention.triton_invariant import TritonInvariant
from slipstream.core.plan import Span, StepPlan
from slipstream.core.request import Request
from slipstream.engine.assembly import assemble
from slipstream.engine.client import QUIET_S, InProcessClient
from slipstream.engine.config import EngineConfig
from slipstream.engine.control import EngineControl
from slipstream.engine.engine import Engine
from slipstream.engine.graphs import StepGraphs
from slipstream.engine.rows import Rows
from slipstream.engine.runner import LONGEST_CAPTURE_S
from slipstream.engine.step_shapes import StepShape, StepShapes
from tests.engine.fake_capture import FakeCapture, captured_engine
from tests.engine.test_laws import GREEDY, PROMPTS, SAMPLED, SAMPLED_PROMPTS
from tests.engine.tiny import one_thread, prompt_ids, run_requests, tiny_gemma3, tiny_llama, write_folder

EAGER = {"device": "cuda", "dtype": "float32", "enforce_eager": True}
NO_REUSE = KvCacheConfig(enable_block_reuse=False)
ON_CPU = {"device": "cpu", "dtype": "float32", "attn_backend": "torch", "kv_cache_config": NO_REUSE}
BOUNDS = {"max_batch_size": 24, "max_num_tokens": 64, "max_seq_len": 128}
# Catches a hang only.
DEADLINE_S = 30.0
SIZES_ON_CPU = (1, 2, 4, 8, 16, 24)


@pytest.fixture(scope="module", params=[tiny_llama, tiny_gemma3], ids=["llama", "gemma3"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(request.param(), tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tiny_llama(), tmp_path_factory.mktemp("llama"))


def shapes_of(*, has_padding: bool = True, draws: bool = False) -> StepShapes:
    return StepShapes.create(
        SIZES_ON_CPU, has_padding=has_padding, max_num_tokens=64, max_seq_len=128, draws=draws
    )


def engine_on_cpu(
    folder: Path, monkeypatch: pytest.MonkeyPatch, shapes: StepShapes, **options: Any
) -> tuple[Engine, Any]:
    assembly = assemble(EngineConfig(model=str(folder), **ON_CPU, **BOUNDS))
    return captured_engine(assembly, shapes, monkeypatch, **options), assembly.limits


def mixture(limits: Any, *, count: int = 30) -> list[Request]:
    """Greedy and sampled requests in turns, so that nearly every step holds both."""
    pairs = zip(PROMPTS + SAMPLED_PROMPTS, GREEDY + SAMPLED, strict=True)
    turns = [pair for i, pair in enumerate(pairs) if i % 2 == 0 or i < count][:count]
    return [Request.create(ids, params, limits, request_id=f"r{i}") for i, (ids, params) in enumerate(turns)]


@pytest.mark.parametrize("kind", ["padded", "invariant", "exact"])
def test_captured_steps_give_the_tokens_of_plain_ones(
    folder: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks, quiet rows, prompts beside decoding rows, choices inside and outside of the same step."""
    plain = assemble(EngineConfig(model=str(folder), **ON_CPU, **BOUNDS))
    with one_thread():
        expected = run_requests(plain.engine, mixture(plain.limits))
        backend = TritonInvariant() if kind == "invariant" else None
        shapes = shapes_of(has_padding=kind != "exact")
        engine, limits = engine_on_cpu(folder, monkeypatch, shapes, backend=backend, depth=2)
        if kind != "exact":
            engine.runner.capture_within(60.0)
        assert run_requests(engine, mixture(limits)) == expected
    counters, stats = engine.runner.counters, engine.scheduler.stats
    assert stats.num_chunks > stats.num_admissions and stats.max_outstanding == 2
    assert len({token for tokens in expected.values() for token in tokens}) > 50
    if kind == "exact":
        # Steps that happen to have one of these sizes, and prompts alone.
        assert 0 < counters["num_late_graphs"] == counters["num_graphs"] <= len(shapes)
        assert 5 < counters["num_graph_steps"] < stats.num_plans
    else:
        assert counters["num_graph_steps"] == stats.num_plans and counters["num_late_graphs"] == 0
        assert counters["num_graphs"] == len(shapes)


# What is drawn inside, and beside it what is not.
DRAWN: list[dict[str, Any]] = [
    {"temperature": 1.0},
    {"temperature": 0.8, "top_p": 0.9},
    {"temperature": 1.3, "min_p": 0.05},
    {"temperature": 0.9, "top_p": 0.95, "min_p": 0.1},
]
OTHERS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0, "top_k": 5},
    {"temperature": 0.7, "min_tokens": 4, "stop_token_ids": list(range(0, 300, 3))},
    {"temperature": 0.8, "top_p": 0.95, "repetition_penalty": 1.3, "logprobs": 3},
    {"logprobs": 2},
]


def drawing(limits: Any, fields: list[dict[str, Any]], *, count: int) -> list[Request]:
    """Requests of all these kinds in turns, of many lengths, so that rows come and go."""
    made: list[Request] = []
    for i in range(count):
        extra = fields[i % len(fields)]
        params = SamplingParams(max_tokens=8 + 5 * i % 17, ignore_eos=True, seed=50 + i, **extra)
        ids = prompt_ids(3 + 11 * i % 70, seed=i)
        made.append(Request.create(ids, params, limits, request_id=f"r{i}"))
    return made


def spoken(engine: Engine, requests: list[Request]) -> tuple[dict[str, list[int]], dict[str, list[Any]]]:
    """Return the tokens of requests, and what came with each: its rank, the leaders' ids, all logprobs."""
    tokens: dict[str, list[int]] = {}
    beside: dict[str, list[Any]] = {}
    for request in requests:
        engine.submit(request)
    while engine.has_work:
        for event in engine.step():
            assert event.error is None, event.error
            tokens.setdefault(event.request_id, []).extend(event.new_token_ids)
            beside.setdefault(event.request_id, []).extend(event.logprobs)
    return tokens, beside


def assert_same_words(
    given: tuple[dict[str, list[int]], dict[str, list[Any]]],
    expected: tuple[dict[str, list[int]], dict[str, list[Any]]],
) -> None:
    assert given[0] == expected[0] and given[1].keys() == expected[1].keys()
    for name, entries in expected[1].items():
        assert len(given[1][name]) == len(entries)
        for one, other in zip(entries, given[1][name], strict=True):
            assert (one.token_id, one.rank) == (other.token_id, other.rank)
            assert [token for token, _ in one.top] == [token for token, _ in other.top]
            # Products of other tiles, in float32.
            found = [other.logprob, *(value for _, value in other.top)]
            assert found == pytest.approx([one.logprob, *(value for _, value in one.top)], abs=1e-4)


@pytest.mark.parametrize("kind", ["padded", "exact"])
def test_rows_draw_inside_what_they_would_outside(
    llama: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows draw inside and outside in turns, for beside prompts all of them draw outside."""
    fields = DRAWN + OTHERS
    plain = assemble(EngineConfig(model=str(llama), **ON_CPU, **BOUNDS))
    with one_thread():
        expected = spoken(plain.engine, drawing(plain.limits, fields, count=18))
        shapes = shapes_of(has_padding=kind == "padded", draws=True)
        engine, limits = engine_on_cpu(llama, monkeypatch, shapes, depth=2)
        if kind == "padded":
            engine.runner.capture_within(60.0)
            assert engine.runner.counters["num_graphs"] == len(shapes)
        assert_same_words(spoken(engine, drawing(limits, fields, count=18)), expected)
    words = expected[0]
    assert len({tuple(tokens) for tokens in words.values()}) == 18 and any(expected[1].values())
    counters = engine.runner.counters
    # All but plain greedy ones and those with top-k.
    num_drawn = sum(len(words[f"r{i}"]) for i in range(18) if i % 9 not in (4, 5))
    least = num_drawn // 3 if kind == "padded" else 4
    assert least < counters["num_inside_draws"] < num_drawn - 8
    assert plain.engine.runner.counters["num_inside_draws"] == 0


def test_without_a_step_that_draws_rows_draw_outside(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    for draws in (False, True):
        engine, limits = engine_on_cpu(llama, monkeypatch, shapes_of(draws=True))
        for shape in shapes_of(draws=draws).in_order():
            engine.runner.capture(shape)
        made.append(run_requests(engine, drawing(limits, DRAWN, count=4)))
        counters = engine.runner.counters
        assert counters["num_graph_steps"] == engine.scheduler.stats.num_plans
        assert (counters["num_inside_draws"] > 0) == draws
    assert made[0] == made[1]


def test_a_row_that_cannot_be_drawn_from_fails_alone(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, limits = engine_on_cpu(llama, monkeypatch, shapes_of(draws=True))
    engine.runner.capture_within(60.0)
    requests = drawing(limits, DRAWN, count=4)
    expected = run_requests(engine, requests)
    logits_of, spoiled = engine.runner.model.logits, 7

    def spoil(hidden_BD: torch.Tensor) -> torch.Tensor:
        logits_BV = logits_of(hidden_BD)
        if len(logits_BV) == 4 and spoiled == 0:
            logits_BV[1, 9] = torch.nan
        return logits_BV

    monkeypatch.setattr(engine.runner.model, "logits", spoil)
    tokens: dict[str, list[int]] = {}
    errors: dict[str, str] = {}
    for request in drawing(limits, DRAWN, count=4):
        engine.submit(request)
    while engine.has_work:
        for event in engine.step():
            tokens.setdefault(event.request_id, []).extend(event.new_token_ids)
            if event.error is not None:
                errors[event.request_id] = str(event.error)
        spoiled = max(0, spoiled - 1)
    assert len(errors) == 1 and "not finite" in next(iter(errors.values()))
    assert all(tokens[name] == expected[name, 0] for name in tokens if name not in errors)


def test_callables_and_searches_go_outside_one_by_one(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def requests(limits: Any) -> list[Request]:
        seen: list[int] = []

        def forbid(token_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
            seen.append(len(token_ids))
            logits[::2] = -torch.inf
            return logits

        fields: list[dict[str, Any]] = [
            {},
            {"logits_processor": forbid},
            {"min_tokens": 6, "stop_token_ids": list(range(0, 300, 3))},
            {"repetition_penalty": 1.4, "logprobs": 2},
            {"use_beam_search": True, "beam_width": 3, "n": 2},
            {"temperature": 1.0, "top_k": 5, "seed": 3},
        ]
        made = []
        for i, extra in enumerate(fields):
            params = SamplingParams(max_tokens=10, ignore_eos=True, **extra)
            made.append(Request.create(prompt_ids(20 + i, seed=i), params, limits, request_id=f"r{i}"))
        return made

    plain = assemble(EngineConfig(model=str(llama), **ON_CPU, **BOUNDS))
    expected = run_requests(plain.engine, requests(plain.limits))
    engine, limits = engine_on_cpu(llama, monkeypatch, shapes_of())
    engine.runner.capture_within(60.0)
    assert run_requests(engine, requests(limits)) == expected
    assert engine.runner.counters["num_graph_steps"] == engine.scheduler.stats.num_plans
    assert all(token % 2 for token in expected["r1", 0]) and len(expected["r2", 0]) >= 6


def test_a_quiet_piece_of_a_prompt_that_goes_bad_ends_its_request(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a step writes that nobody is sampled from could be reused: it is judged inside the step."""
    engine, limits = engine_on_cpu(llama, monkeypatch, shapes_of())
    engine.runner.capture_within(60.0)
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    sound = Request.create(prompt_ids(20, seed=1), params, limits, request_id="sound")
    long = Request.create(prompt_ids(100, seed=2), params, limits, request_id="long")
    alone = run_requests(engine, [Request.create(prompt_ids(20, seed=1), params, limits, request_id="a")])
    engine.submit(sound)
    engine.submit(long)
    forward = engine.runner.model.forward

    def poison(batch: Any) -> torch.Tensor:
        hidden_TD = forward(batch)
        spoiled = (batch.positions_kT[0] >= 40) & (batch.positions_kT[0] < 60)
        return hidden_TD.masked_fill(spoiled[:, None], torch.nan)

    monkeypatch.setattr(engine.runner.model, "forward", poison)
    tokens: dict[str, list[int]] = {"sound": [], "long": []}
    errors: dict[str, str] = {}
    while engine.has_work:
        for event in engine.step():
            tokens[event.request_id] += event.new_token_ids
            if event.error is not None:
                errors[event.request_id] = str(event.error)
    assert tokens["sound"] == alone["a", 0] and not tokens["long"]
    assert list(errors) == ["long"] and "not finite" in errors["long"]
    assert engine.runner.counters["num_graph_steps"] == engine.scheduler.stats.num_plans


def graphs(shapes: StepShapes) -> tuple[StepGraphs, FakeCapture]:
    device = torch.device("cpu")
    capture = FakeCapture(device)
    rows = Rows(max_rows=24, max_seq_len=128, num_groups=1, block_tokens=16, device=device)
    made = StepGraphs(capture, rows, TritonInvariant(), shapes, max_seq_len=128, dtype=torch.float32)
    return made, capture


def decode_plan(count: int) -> StepPlan:
    return StepPlan(0, spans=[Span(row, 9, 1) for row in range(count)], sample=list(range(count)))


KV: Any = ([], [])


def test_a_larger_step_serves_until_the_right_one_is_there() -> None:
    steps, capture = graphs(shapes_of())
    assert steps.shape_of(decode_plan(3)) is None and steps.missing()[0] == StepShape(4)
    steps.capture(StepShape(16), None, KV)
    assert [steps.shape_of(decode_plan(n)) for n in (3, 3, 16, 17)] == [StepShape(16)] * 3 + [None]
    # The one that was missed most comes first.
    assert steps.missing()[:3] == [StepShape(4), StepShape(24), StepShape(24, 8, 64)]
    steps.capture(StepShape(4), None, KV)
    assert steps.shape_of(decode_plan(3)) == StepShape(4) and steps.missing()[0] == StepShape(24)
    prompt = StepPlan(0, spans=[Span(0, 0, 20)], sample=[0])
    assert steps.shape_of(prompt) is None and StepShape(0, 1, 32) in steps.missing()[:2]
    steps.capture(StepShape(0, 1, 64), None, KV)
    assert steps.shape_of(prompt) == StepShape(0, 1, 64)
    assert capture.num_captures == 3 and steps.num_late_captures == 0
    steps.forget()
    assert steps.shape_of(decode_plan(3)) is None and len(steps.missing()) == len(shapes_of())
    while steps.is_missing:
        steps.capture(steps.missing()[0], None, KV)
    assert not steps.missing() and capture.num_captures == 3 + len(shapes_of())
    exact, _ = graphs(shapes_of(has_padding=False))
    assert exact.shape_of(decode_plan(2)) == StepShape(2) and not exact.is_missing and not exact.missing()


def test_a_capture_that_fails_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    steps, capture = graphs(shapes_of())

    def broken(step: Any) -> None:
        raise RuntimeError("no")

    monkeypatch.setattr(capture, "run", broken)
    assert steps.shape_of(decode_plan(2)) is None
    with pytest.raises(RuntimeError):
        steps.capture(StepShape(2), None, KV)
    assert steps.shape_of(decode_plan(2)) is None and StepShape(2) not in steps.missing()
    assert steps.is_missing


def test_the_budget_ends_the_captures_of_a_start(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, _ = engine_on_cpu(llama, monkeypatch, shapes_of())
    clock = iter(range(100))
    # Every look at the clock is a second later, so each capture takes seconds: compiling, but for a part.
    monkeypatch.setattr(time, "monotonic", lambda: float(next(clock)))
    engine.runner.capture_within(2.5 * LONGEST_CAPTURE_S)
    monkeypatch.undo()
    assert engine.runner.counters["num_graphs"] == 3 and engine.runner.wants_capture


def test_what_is_missed_too_often_is_captured_while_requests_wait(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, limits = engine_on_cpu(llama, monkeypatch, shapes_of())
    client = InProcessClient(engine)

    def tokens_of(name: str) -> list[int]:
        params = SamplingParams(max_tokens=48, ignore_eos=True)
        client.submit([Request.create(prompt_ids(20, seed=1), params, limits, request_id=name)])
        return [token for _ in range(48) for e in client.events(0.0) for token in e.new_token_ids]

    # Two steps kernel by kernel would have paid for it; the prompt's own was missed once.
    first = tokens_of("a")
    counters = engine.runner.counters
    assert counters["num_graphs"] == counters["num_late_graphs"] == 1
    assert counters["num_graph_steps"] == 46 and len(first) == 48
    assert tokens_of("b") == first
    assert engine.runner.counters["num_late_graphs"] == 2


def test_padding_pays_for_a_capture_later_than_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    steps, capture = graphs(shapes_of())
    steps.capture(StepShape(16), None, KV)
    found = [(steps.shape_of(decode_plan(3)), steps.take_due()) for _ in range(32)]
    assert found == [(StepShape(16), None)] * 31 + [(StepShape(16), StepShape(4))]
    assert steps.take_due() is None

    def broken(step: Any) -> None:
        raise RuntimeError("no")

    monkeypatch.setattr(capture, "run", broken)
    with pytest.raises(RuntimeError):
        steps.capture_late(StepShape(4), None, KV)
    assert (steps.shape_of(decode_plan(3)), steps.take_due()) == (StepShape(16), None)


def test_a_late_capture_that_fails_changes_nothing(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, limits = engine_on_cpu(llama, monkeypatch, shapes_of())
    client = InProcessClient(engine)
    params = SamplingParams(max_tokens=9, ignore_eos=True)
    monkeypatch.setattr(FakeCapture, "run", lambda self, step: 1 / 0)
    client.submit([Request.create(prompt_ids(20, seed=1), params, limits, request_id="a")])
    events = [event for _ in range(9) for event in client.events(0.0)]
    assert all(event.error is None for event in events)
    assert sum(len(event.new_token_ids) for event in events) == 9
    assert engine.runner.counters["num_late_graphs"] == 1 and engine.runner.counters["num_graphs"] == 0


def test_what_was_missed_is_captured_once_it_is_quiet(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = shapes_of()
    engine, limits = engine_on_cpu(llama, monkeypatch, shapes)
    client = InProcessClient(engine)
    params = SamplingParams(max_tokens=2, ignore_eos=True)
    client.submit([Request.create(prompt_ids(20, seed=1), params, limits, request_id="a")])
    tokens = [token for _ in range(2) for e in client.events(0.0) for token in e.new_token_ids]
    assert engine.can_prepare and engine.runner.counters["num_graphs"] == 0
    # Too short to be quiet; then long enough for all.
    client.events(QUIET_S / 2)
    assert engine.runner.counters["num_graphs"] == 0
    client.events(DEADLINE_S)
    assert engine.runner.counters["num_graphs"] == len(shapes) and not engine.can_prepare
    client.submit([Request.create(prompt_ids(20, seed=1), params, limits, request_id="b")])
    again = [token for _ in range(2) for e in client.events(0.0) for token in e.new_token_ids]
    assert again == tokens and len(tokens) == 2
    counters = engine.runner.counters
    assert counters["num_graph_steps"] == 2 and counters["num_late_graphs"] == 0
    # Without pages nothing is captured, and with new ones everything anew.
    engine.runner.drop_pages()
    assert not engine.can_prepare
    engine.runner.make_pages()
    assert engine.can_prepare


@pytest.fixture(autouse=True)
def exact_float32() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def test_new_pages_are_captured_over_before_requests_come(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assembly = assemble(EngineConfig(model=str(llama), **ON_CPU, **BOUNDS))
    shapes = shapes_of()
    engine = captured_engine(assembly, shapes, monkeypatch)
    commands = EngineControl(assembly, EngineConfig(model=str(llama), **ON_CPU, **BOUNDS)).commands()
    client = InProcessClient(engine, commands)

    def call(name: str, **arguments: Any) -> None:
        future = client.command(name, arguments)
        client.events(0.0)
        future.result(timeout=DEADLINE_S)

    call("sleep", level=1)
    assert not engine.can_prepare
    call("wake_up")
    assert engine.runner.counters["num_graphs"] == len(shapes) and not engine.can_prepare
    call("update_weights", source=str(llama))
    counters = engine.runner.counters
    assert counters["num_graphs"] == 2 * len(shapes) and counters["num_late_graphs"] == 0
    monkeypatch.setattr(FakeCapture, "run", lambda self, step: 1 / 0)
    call("update_weights", source=str(llama))
    # The engine is whole without them.
    params = SamplingParams(max_tokens=4, ignore_eos=True)
    request = Request.create(prompt_ids(20, seed=1), params, assembly.limits, request_id="a")
    assert len(run_requests(engine, [request])["a", 0]) == 4
    assert engine.runner.counters["num_graph_steps"] == 0


def tokens_of(llm: LLM, prompts: list[list[int]], params: list[SamplingParams]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in llm.generate(prompts, params, raise_on_error=True)]


SIZES = {
    "default": None,
    "padded": CudaGraphConfig(batch_sizes=[5, 32]),
    "exact": CudaGraphConfig(batch_sizes=[1, 7, 8, 32], enable_padding=False),
}


@pytest.mark.gpu
@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("sizes", SIZES)
def test_tokens_are_those_of_steps_without_graphs(folder: Path, sizes: str, depth: int) -> None:
    """Law 1: greedy and sampled requests, alone and in batches that shrink as requests end."""
    with LLM(folder, **EAGER) as llm:
        greedy, sampled = tokens_of(llm, PROMPTS, GREEDY), tokens_of(llm, SAMPLED_PROMPTS, SAMPLED)
        assert llm.get_stats()["num_graph_steps"] == 0
    options = {"device": "cuda", "dtype": "float32", "disable_overlap_scheduler": depth == 1}
    with LLM(folder, cuda_graph_config=SIZES[sizes], kv_cache_config=NO_REUSE, **options) as llm:
        assert tokens_of(llm, PROMPTS, GREEDY) == greedy
        first = llm.get_stats()
        assert tokens_of(llm, SAMPLED_PROMPTS, SAMPLED) == sampled
        assert tokens_of(llm, PROMPTS[:3], GREEDY[:3]) == greedy[:3]
        last = llm.get_stats()
    # Sizes that are asked for serve only the steps of 32 rows, or pad all of them to 32.
    assert first["num_graphs"] >= (2 if sizes == "default" else 1) and first["num_graph_steps"] > 20
    assert last["num_graph_steps"] > first["num_graph_steps"] + 10 and last["graph_bytes"] > 0
    assert last["max_outstanding"] == depth


@pytest.mark.gpu
def test_mixtures_are_replayed_and_right(folder: Path) -> None:
    """Everything is captured before the first request; then every step is replayed: pieces, quiet rows, both
    ways of choosing in one step."""
    options = {"device": "cuda", "dtype": "float32", "kv_cache_config": NO_REUSE, **BOUNDS}
    plain = assemble(EngineConfig(model=str(folder), enforce_eager=True, **options))
    expected = run_requests(plain.engine, mixture(plain.limits))
    graphs = CudaGraphConfig(capture_budget_s=100.0)
    assembly = assemble(EngineConfig(model=str(folder), cuda_graph_config=graphs, **options))
    assert assembly.phases["capture"] > 0 and any("captured steps: " in line for line in assembly.report)
    engine = assembly.engine
    before = engine.runner.counters
    assert run_requests(engine, mixture(assembly.limits)) == expected
    counters, stats = engine.runner.counters, engine.scheduler.stats
    assert counters["num_graph_steps"] == stats.num_plans > 20 and stats.num_chunks > stats.num_admissions
    assert counters["num_graphs"] == before["num_graphs"] and counters["num_late_graphs"] == 0
    # Steps share the memory of what they leave, so that all take what the largest do; a segment of the
    # allocator may be more.
    assert counters["graph_bytes"] <= assembly.ledger.graph_bytes + 20 * 2**20


@pytest.mark.gpu
@pytest.mark.parametrize("depth", [1, 2])
def test_draws_inside_are_those_of_steps_without_graphs(llama: Path, depth: int) -> None:
    """The same requests, greedy and not, that come and go; then those that draw inside alone."""
    options: dict[str, Any] = {"device": "cuda", "dtype": "float32", "kv_cache_config": NO_REUSE, **BOUNDS}
    options["disable_overlap_scheduler"] = depth == 1
    plain = assemble(EngineConfig(model=str(llama), enforce_eager=True, **options))
    graphs = CudaGraphConfig(capture_budget_s=100.0)
    assembly = assemble(EngineConfig(model=str(llama), cuda_graph_config=graphs, **options))
    runner = assembly.engine.runner
    for fields in (DRAWN + OTHERS, DRAWN):
        expected = spoken(plain.engine, drawing(plain.limits, fields, count=36))
        given = spoken(assembly.engine, drawing(assembly.limits, fields, count=36))
        assert_same_words(given, expected)
        assert any(expected[1].values()) or fields is DRAWN
    counters = runner.counters
    assert counters["num_inside_draws"] > 150 and plain.engine.runner.counters["num_inside_draws"] == 0
    assert counters["num_graph_steps"] == assembly.engine.scheduler.stats.num_plans
    assert counters["num_late_graphs"] == 0


@pytest.mark.gpu
def test_prompts_alone_are_replayed_and_right(folder: Path) -> None:
    """One request at a time: prompts whole, continued after a prefix hit, and in chunks before the last."""
    params = [SamplingParams(max_tokens=3, ignore_eos=True)] * len(PROMPTS)
    made: list[list[list[int]]] = []
    stats: dict[str, Any] = {}
    for options in (EAGER, {"device": "cuda", "dtype": "float32"}):
        with LLM(folder, max_num_tokens=48, max_batch_size=8, **options) as llm:
            made.append([tokens_of(llm, [p], [s])[0] for p, s in zip(PROMPTS, params, strict=True)])
            stats = llm.get_stats()
    assert made[0] == made[1]
    assert stats["num_cached_tokens"] > 0 and stats["num_chunks"] > stats["num_admissions"]
    # Two decode steps and the last span of the prompt of nearly every request.
    assert stats["num_graph_steps"] > 2.8 * len(PROMPTS)


@pytest.mark.gpu
def test_new_weights_and_sleep_are_captured_anew(tmp_path: Path) -> None:
    """Before the next request, as at a start: what was captured holds the addresses of before."""
    folders = [write_folder(tiny_llama(seed=seed), tmp_path / str(seed)) for seed in (2, 3)]
    expected = []
    for folder in folders:
        with LLM(folder, **EAGER) as llm:
            expected.append(tokens_of(llm, PROMPTS[:4], GREEDY[:4]))
    assert expected[0] != expected[1]
    with LLM(folders[0], device="cuda", dtype="float32") as llm:
        assert tokens_of(llm, PROMPTS[:4], GREEDY[:4]) == expected[0]
        before = llm.get_stats()
        llm.update_weights(folders[1])
        for level in (1, 2):
            now = llm.get_stats()
            assert now["num_graphs"] > before["num_graphs"] + 10 and now["graph_bytes"] > 0
            assert tokens_of(llm, PROMPTS[:4], GREEDY[:4]) == expected[1]
            before = llm.get_stats()
            assert before["num_graph_steps"] > now["num_graph_steps"] + 10
            llm.sleep(level)
            assert llm.get_stats()["graph_bytes"] == 0
            llm.wake_up()
        assert tokens_of(llm, PROMPTS[:4], GREEDY[:4]) == expected[1]


@pytest.mark.gpu
def test_a_row_that_fails_leaves_its_neighbours_alone(folder: Path) -> None:
    """NaN in the pages of one row, which a captured step reads, ends that row."""
    assembly = assemble(EngineConfig(model=folder, device="cuda", dtype="float32"))
    engine = assembly.engine
    runner: Any = engine.runner
    tokens: dict[str, list[int]] = {}
    errors: dict[str, str] = {}
    for name, poison in (("sound", False), ("bad", True)):
        for i in range(3):
            params = SamplingParams(max_tokens=20, ignore_eos=True)
            ids = prompt_ids(30 + i, seed=i)
            engine.submit(Request.create(ids, params, assembly.limits, request_id=f"{name}{i}"))
        for step in range(100):
            if not engine.has_work:
                break
            if poison and step == 8:
                pages = [page for group in runner.rows.pages_of(1) for page in group if page]
                runner.pages[pages] = float("nan")
            for event in engine.step():
                tokens.setdefault(event.request_id, []).extend(event.new_token_ids)
                if event.error is not None:
                    errors[event.request_id] = str(event.error)
    assert runner.counters["num_graph_steps"] > 20
    assert list(errors) == ["bad1"] and "not finite" in errors["bad1"]
    for i in (0, 2):
        assert tokens[f"bad{i}"] == tokens[f"sound{i}"] and len(tokens[f"bad{i}"]) == 20


@pytest.mark.gpu
def test_nothing_waits_between_replays(folder: Path) -> None:
    """Two steps outstanding, every call of the host under torch's sync check, the forward included."""
    assembly = assemble(EngineConfig(model=folder, device="cuda", dtype="float32"))
    scheduler, runner = assembly.engine.scheduler, assembly.engine.runner
    made: dict[str, list[int]] = {}
    for name in ("warm", "timed"):
        for i in range(5):
            extra = DRAWN[i] if i < len(DRAWN) else {}
            params = SamplingParams(max_tokens=24, ignore_eos=True, seed=i, **extra)
            ids = prompt_ids(30 + i, seed=i)
            scheduler.submit(Request.create(ids, params, assembly.limits, request_id=f"{name}{i}"))
        handles: list[Any] = []
        before = runner.counters["num_graph_steps"]
        while scheduler.has_work:
            torch.cuda.set_sync_debug_mode("error" if name == "timed" else "default")
            try:
                while len(handles) < 2 and (plan := scheduler.plan()) is not None:
                    handles.append(runner.launch(plan))
                    runner.sample(handles[-1])
            finally:
                torch.cuda.set_sync_debug_mode("default")
            assert all(handle.error is None for handle in handles)
            for event in scheduler.commit(runner.collect(handles.pop(0))):
                made.setdefault(event.request_id, []).extend(event.new_token_ids)
        assert runner.counters["num_graph_steps"] - before >= 23
        assert runner.counters["num_inside_draws"] > 0 or name == "warm"
    assert all(made[f"warm{i}"] == made[f"timed{i}"] and len(made[f"warm{i}"]) == 24 for i in range(5))
    assert scheduler.stats.max_outstanding == 2
