"""Does beam search say what transformers says, on real models, whatever runs beside it?

Tokens and scores in float32 on tiny twins whose logits are soft enough that hypotheses overtake each other.
Counters show that the prompt ran once and that beams shared its pages.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from slipstream import LLM, KvCacheConfig, RequestError, RequestOutput, SamplingParams, SchedulerConfig
from tests.engine.tiny import (
    EOS,
    VOCAB,
    byte_tokenizer,
    one_thread,
    prompt_ids,
    tiny_gemma3,
    tiny_llama,
    wait_idle,
    write_folder,
)

MAX_TOKENS = 12
PROMPTS = [prompt_ids(length, seed=length) for length in (3, 16, 37)]
# Sums of up to 12 float32 log-softmaxes of two implementations; their scores lie much further apart.
TOLERANCE = 2e-4
MIN_GAP = 1e-3
# Transformers pads what ended early; no model here chooses this token.
PAD = VOCAB - 1
SMALL_STEPS = {"max_num_tokens": 13, "max_batch_size": 13}


@dataclasses.dataclass(frozen=True)
class Subject:
    """A tiny model in transformers, and in a folder."""

    twin: Any
    folder: Path


def soft_llama() -> Any:
    twin = tiny_llama()
    with torch.no_grad():
        twin.lm_head.weight *= 0.2
        twin.lm_head.weight[PAD] = 0.0
    return twin


def soft_gemma3() -> Any:
    twin = tiny_gemma3()
    with torch.no_grad():
        # A norm multiplies by one more than its weight.
        twin.model.norm.weight.add_(1.0).mul_(0.3).sub_(1.0)
        twin.model.embed_tokens.weight[PAD] = 0.0
    return twin


@pytest.fixture(scope="module", autouse=True)
def single_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module", params=[soft_llama, soft_gemma3], ids=["llama", "gemma3"])
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    twin = request.param()
    return Subject(twin, write_folder(twin, tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def llm(subject: Subject) -> Iterator[LLM]:
    with LLM(subject.folder, kv_cache_config=KvCacheConfig(tokens_per_block=8)) as llm:
        yield llm


def beams(width: int, **options: Any) -> SamplingParams:
    fields = {"max_tokens": MAX_TOKENS, "n": width, "ignore_eos": True} | options
    return SamplingParams(use_beam_search=True, beam_width=width, **fields)


def reference(subject: Subject, prompt: list[int], params: SamplingParams) -> list[tuple[list[int], float]]:
    """Return the outputs of transformers with their scores."""
    stops = list(params.stop_token_ids or [])
    subject.twin.generation_config.eos_token_id = None
    generated = subject.twin.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        do_sample=False,
        num_beams=params.beam_width,
        num_return_sequences=params.n,
        length_penalty=1.0 if params.length_penalty is None else params.length_penalty,
        early_stopping=params.early_stopping or False,
        eos_token_id=stops or None,
        pad_token_id=PAD,
        max_new_tokens=params.max_tokens,
        min_new_tokens=params.min_tokens or None,
        return_dict_in_generate=True,
        output_scores=True,
    )
    outputs = [ids[len(prompt) :].tolist() for ids in generated.sequences]
    outputs = [ids[: ids.index(PAD)] if PAD in ids else ids for ids in outputs]
    return list(zip(outputs, generated.sequences_scores.tolist(), strict=True))


def assert_equal(
    output: RequestOutput, expected: list[tuple[list[int], float]], params: SamplingParams
) -> None:
    assert output.error is None and output.finished
    assert [sample.token_ids for sample in output.outputs] == [ids for ids, _ in expected]
    penalty = 1.0 if params.length_penalty is None else params.length_penalty
    for index, (sample, (_, score)) in enumerate(zip(output.outputs, expected, strict=True)):
        assert sample.index == index and sample.cumulative_logprob is not None
        assert sample.cumulative_logprob / len(sample.token_ids) ** penalty == pytest.approx(
            score, abs=TOLERANCE * max(1.0, len(sample.token_ids) ** -penalty)
        )
        is_stop = sample.token_ids[-1] in (params.stop_token_ids or ())
        assert sample.finish_reason == ("stop" if is_stop else "length")
        assert sample.stop_reason == (sample.token_ids[-1] if is_stop else None)


def stops_of(llm: LLM, prompt: list[int], width: int) -> list[int]:
    """Return tokens that hypotheses of this search contain, so that it ends early with them as stops."""
    outputs = llm.generate(prompt, beams(width)).outputs
    return sorted({token for sample in outputs for token in sample.token_ids[2::4]} - {PAD})[:3]


OPTIONS: list[dict[str, Any]] = [
    {},
    {"length_penalty": 0.0},
    {"length_penalty": 2.0},
    {"length_penalty": -1.0},
    {"early_stopping": True},
    {"early_stopping": True, "length_penalty": 2.0},
    {"early_stopping": "never"},
    {"early_stopping": "never", "length_penalty": 2.0},
    {"early_stopping": "never", "length_penalty": 0.0},
    {"min_tokens": 5},
    {"min_tokens": 5, "early_stopping": True},
    {"n": 1},
]


@pytest.mark.parametrize("width", [2, 4])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_tokens_and_scores_of_transformers(
    subject: Subject, llm: LLM, width: int, options: dict[str, Any]
) -> None:
    for prompt in PROMPTS:
        params = beams(width, **options, stop_token_ids=stops_of(llm, prompt, width))
        assert_equal(llm.generate(prompt, params), reference(subject, prompt, params), params)


def test_the_comparison_means_something(subject: Subject, llm: LLM) -> None:
    """Hypotheses end at different lengths, beat greedy decoding, and do not tie."""
    lengths: set[int] = set()
    num_better = 0
    for prompt in PROMPTS:
        params = beams(4, stop_token_ids=stops_of(llm, prompt, 4))
        expected = reference(subject, prompt, params)
        lengths |= {len(ids) for ids, _ in expected}
        scores = [score for _, score in expected]
        assert all(a - b > MIN_GAP for a, b in itertools.pairwise(scores)), scores
        plain = llm.generate(prompt, dataclasses.replace(params, **NO_SEARCH))
        num_better += plain.outputs[0].token_ids != expected[0][0]
    assert len(lengths) >= 3 and num_better > 0


NO_SEARCH: dict[str, Any] = {"use_beam_search": False, "beam_width": None, "n": 1}


def test_the_models_own_end_token(subject: Subject, tmp_path: Path) -> None:
    # A prompt of whole characters, so that the output begins with one.
    prompt = byte_tokenizer().encode("the cat sat").ids
    with LLM(subject.folder) as llm:
        stops = stops_of(llm, prompt, 3)
    folder = write_folder(subject.twin, tmp_path, eos_token_ids=[EOS, *stops])
    with LLM(folder) as llm:
        output = llm.generate(prompt, beams(3, ignore_eos=False))
    params = beams(3, stop_token_ids=[EOS, *stops])
    assert_equal(output, reference(subject, prompt, params), params)
    assert "stop" in {sample.finish_reason for sample in output.outputs}
    ended = next(sample for sample in output.outputs if sample.finish_reason == "stop")
    # The token that ended it is among the ids and not in the text.
    assert ended.text == output_text(llm, ended.token_ids[:-1], prompt)


def output_text(llm: LLM, ids: list[int], prompt: list[int]) -> str:
    return llm.tokenizer.decode([*prompt, *ids])[len(llm.tokenizer.decode(prompt)) :]


def test_logprobs_are_those_of_the_outputs(subject: Subject, llm: LLM) -> None:
    prompt = PROMPTS[2]
    output = llm.generate(prompt, beams(3, logprobs=2, return_generation_logits=True, prompt_logprobs=1))
    assert len(output.prompt_logprobs) == len(prompt)
    for sample in output.outputs:
        with torch.no_grad():
            logits = subject.twin(torch.tensor([[*prompt, *sample.token_ids]])).logits[
                0, len(prompt) - 1 : -1
            ]
        expected = logits.log_softmax(-1)
        assert len(sample.logprobs) == len(sample.token_ids)
        # float32 noise of two implementations, as above.
        torch.testing.assert_close(sample.generation_logits, logits, rtol=1e-4, atol=2e-4)
        for place, (token, entry) in enumerate(zip(sample.token_ids, sample.logprobs, strict=True)):
            value = float(expected[place, token])
            assert entry[token].logprob == pytest.approx(value, abs=TOLERANCE)
            assert entry[token].rank == int((expected[place] > value).sum()) + 1
            top = expected[place].topk(2).indices.tolist()
            assert list(entry)[:2] == top and len(entry) <= 3
        total = sum(entry[t].logprob for t, entry in zip(sample.token_ids, sample.logprobs, strict=True))
        # The same numbers, added in another order.
        assert sample.cumulative_logprob == pytest.approx(total, abs=1e-9)


def test_masks_apply(llm: LLM) -> None:
    prompt = PROMPTS[1]
    free = llm.generate(prompt, beams(3)).outputs
    banned = free[0].token_ids[1]
    allowed = sorted({token for sample in free for token in sample.token_ids})
    for options in ({"bad_token_ids": [banned]}, {"allowed_token_ids": [t for t in allowed if t != banned]}):
        output = llm.generate(prompt, beams(3, **options), raise_on_error=True)
        assert all(banned not in sample.token_ids for sample in output.outputs)
    pairs = llm.generate(prompt, beams(3, no_repeat_ngram_size=2), raise_on_error=True).outputs
    for sample in pairs:
        ids = [*prompt, *sample.token_ids]
        seen = list(itertools.pairwise(ids))
        assert len(set(seen[len(prompt) - 1 :])) == len(sample.token_ids)


SETTINGS: dict[str, dict[str, Any]] = {
    "together": {},
    "overlapped": {"disable_overlap_scheduler": False},
    "chunks": SMALL_STEPS,
    "small pool": {"kv_cache_config": KvCacheConfig(max_tokens=128, tokens_per_block=8)},
    "whole blocks": {"kv_cache_config": KvCacheConfig(enable_partial_reuse=False, tokens_per_block=8)},
    "no reuse": {"kv_cache_config": KvCacheConfig(enable_block_reuse=False)},
    "no evict": {
        "kv_cache_config": KvCacheConfig(max_tokens=256, tokens_per_block=8),
        "scheduler_config": SchedulerConfig(capacity_scheduler_policy="GUARANTEED_NO_EVICT"),
    },
}


@pytest.mark.parametrize("name", SETTINGS)
def test_results_do_not_depend_on_neighbours(subject: Subject, llm: LLM, name: str) -> None:
    prompts = [*PROMPTS, prompt_ids(30, seed=5), [*PROMPTS[2][:30], 99, 98]]
    each = [beams(2 + i % 3, length_penalty=i % 2, early_stopping=i == 2) for i in range(len(prompts))]
    alone = [llm.generate(prompt, params) for prompt, params in zip(prompts, each, strict=True)]
    plain = SamplingParams(max_tokens=20, ignore_eos=True)
    with LLM(subject.folder, **SETTINGS[name]) as crowded:
        others = [crowded.generate_async(prompt_ids(9 + i, seed=70 + i), plain) for i in range(4)]
        outputs = crowded.generate(prompts, each, raise_on_error=True)
        for other in others:
            other.result(60)
        stats = crowded.get_stats()
    for output, expected in zip(outputs, alone, strict=True):
        assert [s.token_ids for s in output.outputs] == [s.token_ids for s in expected.outputs]
        for sample, same in zip(output.outputs, expected.outputs, strict=True):
            assert sample.cumulative_logprob == pytest.approx(same.cumulative_logprob, abs=TOLERANCE)
    assert stats["num_copied_blocks"] > 0 and stats["num_free_pages"] == stats["num_pages"]
    assert (stats["num_preemptions"] > 0) == (name == "small pool")
    assert (stats["max_outstanding"] == 2) == (name == "overlapped")


def test_the_prompt_is_computed_once(subject: Subject) -> None:
    prompt = prompt_ids(70, seed=90)
    with LLM(subject.folder, kv_cache_config=KvCacheConfig(tokens_per_block=8)) as llm:
        output = llm.generate(prompt, beams(4, n=2))
        stats = llm.get_stats()
        assert stats["executed_tokens"] == 70 + 4 * (MAX_TOKENS - 1)
        assert stats["num_chunks"] == stats["num_admissions"] == 1
        again = llm.generate(prompt, beams(4, n=2))
        # A second search finds the prompt in the cache, all but its last token.
        assert again.num_cached_tokens == 69
        assert llm.get_stats()["executed_tokens"] == stats["executed_tokens"] + 1 + 4 * (MAX_TOKENS - 1)
    assert [s.token_ids for s in again.outputs] == [s.token_ids for s in output.outputs]


def test_an_abort_ends_every_output(llm: LLM) -> None:
    generation = llm.generate_async(PROMPTS[0], beams(4, max_tokens=400, n=3))
    generation.abort()
    output = generation.result(60)
    assert [sample.finish_reason for sample in output.outputs] == ["cancelled"] * 3
    timed = llm.generate(PROMPTS[0], beams(4, max_tokens=400, n=3), timeout_s=0.05)
    assert [sample.finish_reason for sample in timed.outputs] == ["timeout"] * 3
    wait_idle(llm)


def test_streaming_is_refused_with_a_sentence(llm: LLM) -> None:
    with pytest.raises(RequestError, match="streaming does not combine with use_beam_search"):
        llm.generate_async(PROMPTS[0], beams(2), streaming=True)
    assert llm.generate_async(PROMPTS[0], beams(2)).result(60).finished


def test_the_engine_bounds_the_width(subject: Subject) -> None:
    with LLM(subject.folder, max_beam_width=3) as llm:
        assert len(llm.generate(PROMPTS[0], beams(3)).outputs) == 3
        error = llm.generate(PROMPTS[0], beams(4)).error
    assert error.param == "beam_width" and "from 1 to 3" in error.message
