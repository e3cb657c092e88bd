"""Do a request's tokens depend on anything but the request? Law 1 of determinism, in float32, on real models.

Each of 32 mixed requests runs alone first, without any reuse, and must be what transformers generates. Then
the same tokens must come out whatever the engine does to it: batches, chunks, prefix hits, copied blocks,
preemption, steps in flight, aborted neighbours. Counters show that each of these really happened, gaps that
the comparison means something, and one changed weight that it can fail.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from slipstream import LLM, KvCacheConfig, SamplingParams
from slipstream.core.limits import Limits
from slipstream.core.request import Request
from slipstream.engine.assembly import assemble
from slipstream.engine.config import EngineConfig
from tests.engine.tiny import (
    VOCAB,
    byte_tokenizer,
    one_thread,
    prompt_ids,
    run_requests,
    smallest_gap,
    tiny_gemma3,
    tiny_llama,
    write_folder,
)

Stats = dict[str, int]
MIN_GAP = 1e-3
MIN_DISTINCT = 8
LONGEST = 144
NO_REUSE = KvCacheConfig(enable_block_reuse=False)
# Little more than the longest request (115 tokens), for 32 of them.
SMALL_POOL = KvCacheConfig(max_tokens=144, tokens_per_block=8)


def mixed_prompts() -> list[list[int]]:
    """32 prompts: lone ones of many lengths, three families with a common start, equal ones, texts."""
    lone = [prompt_ids(3 + 12 * i, seed=i) for i in range(8)]
    long_start, odd_start = prompt_ids(64, seed=20), prompt_ids(45, seed=21)
    siblings = [long_start + prompt_ids(1 + i, seed=30 + i) for i in range(8)]
    cousins = [odd_start + prompt_ids(5, seed=40 + i) for i in range(8)]
    equal = [prompt_ids(33, seed=50)] * 4
    texts = ["the cat sat", "the cat ran home", "Zürich 🙂", "a"]
    return [*lone, *siblings, *cousins, *equal, *(byte_tokenizer().encode(text).ids for text in texts)]


PROMPTS = mixed_prompts()
GREEDY = [SamplingParams(max_tokens=24 + 4 * (i % 3), ignore_eos=True) for i in range(len(PROMPTS))]
SAMPLED_PROMPTS = PROMPTS[::2]
SAMPLED = [
    SamplingParams(
        max_tokens=16,
        ignore_eos=True,
        temperature=1.0,
        seed=1000 + i,
        top_p=(1.0, 0.9)[i % 4 // 2],
        top_k=(0, 0, 20)[i % 3],
        # Without this the loud logits of a tiny model leave nothing to chance.
        repetition_penalty=(1.0, 1.3)[i % 4 // 2],
    )
    for i in range(0, len(PROMPTS), 2)
]


@dataclasses.dataclass(frozen=True)
class Subject:
    """One tiny model, and what each request generates alone."""

    folder: Path
    twin: Any
    greedy: list[list[int]]
    sampled: list[list[int]]


@pytest.fixture(scope="module", autouse=True)
def single_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module", params=[tiny_llama, tiny_gemma3], ids=["llama", "gemma3"])
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    twin = request.param()
    folder = write_folder(twin, tmp_path_factory.mktemp("model"))
    with LLM(folder, kv_cache_config=NO_REUSE, disable_overlap_scheduler=True) as llm:
        greedy = [tokens_of(llm, [p], [s])[0] for p, s in zip(PROMPTS, GREEDY, strict=True)]
        sampled = [tokens_of(llm, [p], [s])[0] for p, s in zip(SAMPLED_PROMPTS, SAMPLED, strict=True)]
        stats = llm.get_stats()
    assert stats["num_cached_tokens"] == stats["num_preemptions"] == 0
    assert stats["num_chunks"] == stats["num_admissions"] == len(PROMPTS) + len(SAMPLED)
    assert stats["max_outstanding"] == 1
    return Subject(folder, twin, greedy, sampled)


def tokens_of(llm: LLM, prompts: list[list[int]], params: list[SamplingParams]) -> list[list[int]]:
    outputs = llm.generate(prompts, params, raise_on_error=True)
    assert [len(o.outputs[0].token_ids) for o in outputs] == [p.max_tokens for p in params]
    return [output.outputs[0].token_ids for output in outputs]


def assert_same(given: list[list[int]], expected: list[list[int]]) -> None:
    wrong = [i for i, (a, b) in enumerate(zip(given, expected, strict=True)) if a != b]
    assert not wrong, f"requests {wrong} depend on more than themselves"


def test_alone_is_what_transformers_generates(subject: Subject) -> None:
    gaps = [smallest_gap(subject.twin, p, out) for p, out in zip(PROMPTS, subject.greedy, strict=True)]
    assert min(gaps) > MIN_GAP
    assert min(len(set(out)) for out in subject.greedy) >= MIN_DISTINCT


def test_sampled_outputs_are_random(subject: Subject) -> None:
    """Else the comparisons of sampled outputs would be greedy ones."""
    by_seed = zip(subject.sampled, subject.greedy[::2], strict=True)
    assert sum(a != b[: len(a)] for a, b in by_seed) > len(SAMPLED) // 2


def had_batches(stats: Stats) -> bool:
    return stats["num_plans"] * 8 < stats["executed_tokens"]


def had_preemptions(stats: Stats) -> bool:
    return stats["num_preemptions"] > 0 and stats["num_short_rows"] > 0


def had_chunks(stats: Stats) -> bool:
    return stats["num_chunks"] > stats["num_admissions"]


def had_hits(stats: Stats) -> bool:
    return stats["num_cached_tokens"] > 0 and stats["num_copied_blocks"] > 0


def had_no_copies(stats: Stats) -> bool:
    return stats["num_cached_tokens"] > 0 and stats["num_copied_blocks"] == 0


def had_overlap(stats: Stats) -> bool:
    return stats["max_outstanding"] == 2


def had_no_overlap(stats: Stats) -> bool:
    return stats["max_outstanding"] == 1


@dataclasses.dataclass(frozen=True)
class Setting:
    """Options of an LLM, and what must have happened in it. `rounds`: how often it gets all prompts."""

    options: dict[str, Any]
    claims: list[Callable[[Stats], bool]]
    rounds: int = 1


SMALL_STEPS = {"max_num_tokens": 13, "max_batch_size": 9}
SETTINGS = {
    "together": Setting({}, [had_batches, had_no_overlap]),
    "together without reuse": Setting({"kv_cache_config": NO_REUSE}, [had_batches]),
    "again": Setting({}, [had_hits], rounds=2),
    "whole blocks only": Setting(
        {"kv_cache_config": KvCacheConfig(enable_partial_reuse=False, tokens_per_block=8)},
        [had_no_copies],
        rounds=2,
    ),
    "small blocks": Setting({"kv_cache_config": KvCacheConfig(tokens_per_block=8)}, [had_hits], rounds=2),
    "large blocks": Setting({"kv_cache_config": KvCacheConfig(tokens_per_block=64)}, [had_hits], rounds=2),
    "chunks": Setting(SMALL_STEPS, [had_chunks]),
    "smallest chunks": Setting({"max_num_tokens": 6, "max_batch_size": 5}, [had_chunks]),
    "whole prompts": Setting({"enable_chunked_prefill": False, "max_num_tokens": LONGEST}, [had_batches]),
    "preempted": Setting({"kv_cache_config": SMALL_POOL}, [had_preemptions, had_no_overlap]),
    "overlapped": Setting({"disable_overlap_scheduler": False}, [had_overlap, had_batches]),
    "everything": Setting(
        {"kv_cache_config": SMALL_POOL, "disable_overlap_scheduler": False, **SMALL_STEPS},
        [had_preemptions, had_chunks, had_hits, had_overlap],
    ),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_greedy_tokens_are_those_of_the_request_alone(subject: Subject, name: str) -> None:
    setting = SETTINGS[name]
    with LLM(subject.folder, **setting.options) as llm:
        for _ in range(setting.rounds):
            assert_same(tokens_of(llm, PROMPTS, GREEDY), subject.greedy)
        stats = llm.get_stats()
    for claim in setting.claims:
        assert claim(stats), f"{claim.__name__} does not hold: {stats}"
    assert stats["num_free_pages"] == stats["num_pages"]


@pytest.mark.parametrize("name", ["together", "everything"])
def test_sampled_tokens_are_those_of_the_request_alone(subject: Subject, name: str) -> None:
    setting = SETTINGS[name]
    with LLM(subject.folder, **setting.options) as llm:
        for _ in range(setting.rounds):
            assert_same(tokens_of(llm, SAMPLED_PROMPTS, SAMPLED), subject.sampled)
        # Sampled and greedy rows in one batch, in the other order.
        both = tokens_of(llm, [*SAMPLED_PROMPTS[::-1], *PROMPTS], [*SAMPLED[::-1], *GREEDY])
        assert_same(both, [*subject.sampled[::-1], *subject.greedy])
        stats = llm.get_stats()
    assert all(claim(stats) for claim in setting.claims if claim is not had_no_overlap)


@pytest.mark.parametrize("is_overlap_off", [True, False])
def test_aborted_neighbours_change_nothing(subject: Subject, is_overlap_off: bool) -> None:
    with LLM(
        subject.folder, kv_cache_config=SMALL_POOL, disable_overlap_scheduler=is_overlap_off, **SMALL_STEPS
    ) as llm:
        neighbours = [
            llm.generate_async(prompt, SamplingParams(max_tokens=60, ignore_eos=True), streaming=True)
            for prompt in PROMPTS[8:20]
        ]
        kept = [llm.generate_async(prompt, params) for prompt, params in zip(PROMPTS, GREEDY, strict=True)]
        for count, neighbour in enumerate(neighbours):
            for _ in zip(range(count % 4), neighbour, strict=False):
                pass
            neighbour.abort()
        assert_same([one.result(120).outputs[0].token_ids for one in kept], subject.greedy)
        reasons = {one.result(120).outputs[0].finish_reason for one in neighbours}
        stats = llm.get_stats()
    assert reasons == {"cancelled"}
    assert had_preemptions(stats) and had_chunks(stats)
    assert stats["num_free_pages"] == stats["num_pages"]


def test_one_changed_weight_is_noticed(subject: Subject) -> None:
    with LLM(subject.folder) as llm:
        weight = llm.startup.engine.runner.model.layers[1].attention.qkv.weight
        with torch.inference_mode():
            weight[0, 0] += 0.5
        changed = tokens_of(llm, PROMPTS, GREEDY)
    with pytest.raises(AssertionError, match="depend on more"):
        assert_same(changed, subject.greedy)


NUM_SAMPLES = 4
LIMITS = Limits(vocab_size=VOCAB, max_seq_len=LONGEST)


def seeded(name: str, prompt: list[int], *, n: int = 1) -> Request:
    params = SamplingParams(max_tokens=24, temperature=1.0, seed=77, n=n, repetition_penalty=1.3)
    return Request.create(prompt, params, LIMITS, request_id=name)


@pytest.mark.parametrize("name", ["together", "everything"])
def test_four_samples_are_four_single_runs(subject: Subject, name: str) -> None:
    """Sample i alone is the request with the same seed and sample index, in an engine of its own."""
    prompt = PROMPTS[10]
    options = SETTINGS[name].options
    engine = assemble(EngineConfig(model=subject.folder, kv_cache_config=NO_REUSE)).engine
    single = {}
    for sample in seeded("n", prompt, n=NUM_SAMPLES).samples():
        single |= run_requests(engine, [sample])
    assert len({tuple(tokens) for tokens in single.values()}) == NUM_SAMPLES
    engine = assemble(EngineConfig(model=subject.folder, **options)).engine
    others = [seeded(f"other {i}", other) for i, other in enumerate(PROMPTS)]
    together = run_requests(engine, [*others[:9], seeded("n", prompt, n=NUM_SAMPLES), *others[9:]])
    assert {key: together[key] for key in single} == single
    # n itself changes nothing: other 10 is the same prompt and seed with n = 1.
    assert together["other 10", 0] == single["n", 0]
    assert had_hits(dataclasses.asdict(engine.scheduler.stats))


def test_samples_of_a_prompt_compute_it_once(subject: Subject) -> None:
    with LLM(subject.folder) as llm:
        prompt = prompt_ids(70, seed=90)
        params = SamplingParams(max_tokens=8, n=NUM_SAMPLES, temperature=1.0, seed=3, ignore_eos=True)
        output = llm.generate(prompt, params)
        stats = llm.get_stats()
    assert [sample.index for sample in output.outputs] == list(range(NUM_SAMPLES))
    # The prompt once, its last token once more for each sibling, and seven fed back tokens of each sample.
    assert stats["executed_tokens"] == 70 + (NUM_SAMPLES - 1) + NUM_SAMPLES * 7
    assert output.num_cached_tokens == 69
