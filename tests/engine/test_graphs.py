"""Is a replayed step the step it was captured from, for every request, size and change of weights?

What may be captured is decided on the host and tested anywhere; replaying needs one CUDA device. Tokens are
compared in float32 with TF32 off, on the prompts of law 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from slipstream import LLM, CudaGraphConfig, KvCacheConfig, SamplingParams
from slipstream.core.plan import Span, StepPlan
from slipstream.core.request import Request
from slipstream.engine.assembly import assemble
from slipstream.engine.config import EngineConfig
from slipstream.engine.graphs import DecodeGraphs
from slipstream.engine.prompt_graphs import PromptGraphs
from slipstream.engine.rows import Rows
from tests.engine.test_laws import GREEDY, PROMPTS, SAMPLED, SAMPLED_PROMPTS
from tests.engine.tiny import prompt_ids, tiny_gemma3, tiny_llama, write_folder

EAGER = {"device": "cuda", "dtype": "float32", "enforce_eager": True}
NO_REUSE = KvCacheConfig(enable_block_reuse=False)


def graphs(sizes: tuple[int, ...], *, has_padding: bool = True) -> DecodeGraphs:
    nothing: Any = None
    return DecodeGraphs(nothing, nothing, nothing, sizes, has_padding=has_padding, max_seq_len=64)


def plan_of(*spans: Span, sample: list[int] | None = None, **fields: Any) -> StepPlan:
    rows = [span.row for span in spans] if sample is None else sample
    return StepPlan(0, spans=list(spans), sample=rows, **fields)


def test_which_steps_have_a_size() -> None:
    three = [Span(row, 9, 1) for row in (4, 0, 2)]
    assert graphs((1, 2, 4)).size_of(plan_of(*three)) == 4
    assert graphs((1, 2, 4), has_padding=False).size_of(plan_of(*three)) is None
    assert graphs((1, 3), has_padding=False).size_of(plan_of(*three)) == 3
    assert graphs((1, 2)).size_of(plan_of(*three)) is None
    for other in (
        plan_of(*three, sample=[4, 0]),
        plan_of(*three, sample=[0, 4, 2]),
        plan_of(*three, Span(1, 0, 5)),
        plan_of(*three, logits=[(4, 9, 1, "hidden_states")]),
        plan_of(Span(1, 9, 1, parents=(0,))),
        plan_of(),
    ):
        assert graphs((1, 2, 4)).size_of(other) is None


def test_which_prompts_have_a_length() -> None:
    nothing: Any = None
    rows = Rows(max_rows=2, max_seq_len=100, num_groups=1, block_tokens=16, device=torch.device("cpu"))
    prompts = PromptGraphs(nothing, rows, nothing, max_seq_len=100)
    lengths = [prompts.size_of(plan_of(Span(1, 7, count))) for count in (1, 2, 16, 17, 90, 97)]
    assert lengths == [None, 16, 16, 32, 96, None]
    for other in (
        plan_of(Span(1, 0, 20), sample=[]),
        plan_of(Span(1, 0, 20), Span(0, 0, 20)),
        plan_of(Span(1, 0, 20), logits=[(1, 0, 20, "hidden_states")]),
    ):
        assert prompts.size_of(other) is None


@pytest.fixture(autouse=True)
def exact_float32() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.fixture(scope="module", params=[tiny_llama, tiny_gemma3], ids=["llama", "gemma3"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(request.param(), tmp_path_factory.mktemp("model"))


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
    folders = [write_folder(tiny_llama(seed=seed), tmp_path / str(seed)) for seed in (2, 3)]
    expected = []
    for folder in folders:
        with LLM(folder, **EAGER) as llm:
            expected.append(tokens_of(llm, PROMPTS[:4], GREEDY[:4]))
    assert expected[0] != expected[1]
    with LLM(folders[0], device="cuda", dtype="float32") as llm:
        assert tokens_of(llm, PROMPTS[:4], GREEDY[:4]) == expected[0]
        captured = llm.get_stats()["num_graphs"]
        llm.update_weights(folders[1])
        assert llm.get_stats()["graph_bytes"] == 0
        assert tokens_of(llm, PROMPTS[:4], GREEDY[:4]) == expected[1]
        assert llm.get_stats()["num_graphs"] > captured
        for level in (1, 2):
            llm.sleep(level)
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
            params = SamplingParams(max_tokens=24, ignore_eos=True)
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
    assert all(made[f"warm{i}"] == made[f"timed{i}"] and len(made[f"warm{i}"]) == 24 for i in range(5))
    assert scheduler.stats.max_outstanding == 2
