"""Do requests behind a common beginning get the tokens they get alone, and is it read once for all of them?

The tiny models share a few blocks, which would not pay: the rule is told that anything does. What is read is
shown by poison: while steps decode, every row's table but the first one's names a page of NaN where pages are
shared. The two best logits lie more than 5e-3 apart everywhere, and two float32 implementations some 1e-4.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from slipstream import LLM, SamplingParams
from slipstream.attention import shared_prefix
from slipstream.core.request import Request
from slipstream.engine.assembly import assemble
from slipstream.engine.config import EngineConfig
from slipstream.engine.engine import Engine
from slipstream.engine.step_shapes import StepShapes
from slipstream.kernels.shared_prefix_decode import shared_prefix_decode
from tests.engine.fake_capture import captured_engine
from tests.engine.tiny import one_thread, prompt_ids, run_requests, tiny_gemma3, tiny_llama, write_folder

ON_CPU = {"device": "cpu", "dtype": "float32", "attn_backend": "torch"}
BOUNDS = {"max_batch_size": 12, "max_num_tokens": 128, "max_seq_len": 192}
PREFIXES = [prompt_ids(100, seed=1), prompt_ids(70, seed=2)]


@pytest.fixture(autouse=True)
def anything_pays(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(shared_prefix, "MIN_GROUP_BYTES", 1)
    monkeypatch.setattr(shared_prefix, "MIN_STEP_BYTES", 1)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.fixture(scope="module", params=[tiny_llama, tiny_gemma3], ids=["llama", "gemma3"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(request.param(), tmp_path_factory.mktemp("model"))


def prompts() -> list[tuple[list[int], int]]:
    """Return prompts and how many tokens each is to get: two groups in turns, one request of its own."""
    made = [(PREFIXES[i % 2] + prompt_ids(3 + i, seed=10 + i), 4 + 2 * i) for i in range(9)]
    return [*made, (prompt_ids(40, seed=30), 12)]


def requests(limits: Any) -> list[Request]:
    def one(i: int, ids: list[int], count: int) -> Request:
        params = SamplingParams(max_tokens=count, ignore_eos=True)
        return Request.create(ids, params, limits, request_id=f"r{i}")

    return [one(i, ids, count) for i, (ids, count) in enumerate(prompts())]


def run_behind_prefixes(engine: Engine, limits: Any) -> dict[tuple[str, int], list[int]]:
    """Run a request for each beginning, so that it is cached, then all the others together."""
    for i, ids in enumerate(PREFIXES):
        params = SamplingParams(max_tokens=1, ignore_eos=True)
        run_requests(engine, [Request.create([*ids, 9], params, limits, request_id=f"first{i}")])
    return run_requests(engine, requests(limits))


def poisoned(seen: list[int]) -> Any:
    """Return the definition over tables that name the shared pages in the first row of a group alone."""

    def decode(q: Any, kv: Any, table: Any, lens: Any, borders: Any, *others: Any) -> None:
        count, entries, _, rows_5R = others[:4]
        table = table.clone()
        nowhere = torch.full_like(kv[:1], torch.nan)
        for row, (shared, entry) in enumerate(rows_5R[:2].T.tolist()):
            if shared and int(entries[entry, 2]) != row:
                table[row, : shared // kv.shape[2]] = len(kv)
                seen.append(shared)
        shared_prefix_decode(q, torch.cat((kv, nowhere)), table, lens, borders, *others)
        assert int(count) > 0

    return decode


@pytest.mark.parametrize("is_captured", [True, False], ids=["captured", "plain"])
def test_tokens_are_those_of_requests_alone(
    folder: Path, is_captured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = StepShapes()
    if is_captured:
        shapes = StepShapes.create(
            (1, 2, 4, 8, 12), has_padding=True, max_num_tokens=128, max_seq_len=192, shares=True
        )
    alone: dict[tuple[str, int], list[int]] = {}
    with one_thread():
        plain = assemble(EngineConfig(model=str(folder), **ON_CPU, **BOUNDS))
        for request in requests(plain.limits):
            alone |= run_requests(plain.engine, [request])
        assembly = assemble(EngineConfig(model=str(folder), **ON_CPU, **BOUNDS))
        engine = captured_engine(assembly, shapes, monkeypatch, depth=2)
        engine.runner.capture_within(60.0)
        seen: list[int] = []
        monkeypatch.setattr("slipstream.attention.triton.shared_prefix_decode_op", poisoned(seen))
        assert run_behind_prefixes(engine, assembly.limits) == alone
    counters = engine.runner.counters
    steps, rows = counters["num_shared_prefix_steps"], counters["num_shared_prefix_rows"]
    # Requests of both groups end one after another; the last step that shares has two rows left.
    assert steps >= 10 and rows >= 4 * steps and counters["num_spared_positions"] > 64 * steps
    assert seen and {96, 64} & set(seen)
    if is_captured:
        assert counters["num_late_graphs"] == 0 and counters["num_graphs"] == len(shapes)
    else:
        assert counters["num_graph_steps"] == 0


def test_without_a_common_beginning_nothing_is_shared(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assembly = assemble(EngineConfig(model=str(folder), **ON_CPU, **BOUNDS))
    engine = captured_engine(assembly, StepShapes(), monkeypatch)
    params = SamplingParams(max_tokens=3, ignore_eos=True)
    made = [
        Request.create(prompt_ids(40, seed=i), params, assembly.limits, request_id=f"{i}") for i in range(4)
    ]
    run_requests(engine, made)
    assert engine.runner.counters["num_shared_prefix_steps"] == 0
    assert engine.runner.counters["num_spared_positions"] == 0


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"enforce_eager": True}], ids=["captured", "plain"])
def test_on_a_gpu(folder: Path, options: dict[str, Any]) -> None:
    """Law 1 with real captures: all at once behind cached beginnings, twice, against one by one."""
    settings = {"device": "cuda", "dtype": "float32", **BOUNDS, **options}
    params = [SamplingParams(max_tokens=count, ignore_eos=True) for _, count in prompts()]
    ids = [prompt for prompt, _ in prompts()]
    with LLM(folder, **settings) as llm:
        one_by_one = zip(ids, params, strict=True)
        alone = [llm.generate(i, p, raise_on_error=True).outputs[0].token_ids for i, p in one_by_one]
        assert llm.get_stats()["num_shared_prefix_steps"] == 0
        for _ in range(2):
            outputs = llm.generate(ids, params, raise_on_error=True)
            assert [output.outputs[0].token_ids for output in outputs] == alone
        stats = llm.get_stats()
    assert stats["num_shared_prefix_steps"] >= 10
    assert stats["num_shared_prefix_rows"] >= 4 * stats["num_shared_prefix_steps"]
