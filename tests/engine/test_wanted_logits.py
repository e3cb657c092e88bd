"""Logprobs and logits of prompt and output positions equal transformers', whatever the schedule."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from slipstream import LLM, KvCacheConfig, SamplingParams
from slipstream.core.outputs import RequestOutput
from slipstream.core.request import Request
from slipstream.engine import wanted_logits
from slipstream.engine.assembly import assemble
from slipstream.engine.config import EngineConfig
from slipstream.engine.output_processor import OutputProcessor
from tests.engine.tiny import VOCAB, byte_tokenizer, prompt_ids, tiny_gemma3, tiny_llama, write_folder

# The logits of these twins reach 60, where float32 resolves 4e-6; two orders of summation over 3 or 4 layers
# differ by a few of these. transformers itself moves as much when it runs a prompt in two chunks.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-3}
EVERYTHING = {
    "prompt_logprobs": 3,
    "logprobs": 2,
    "return_context_logits": True,
    "return_generation_logits": True,
    "ignore_eos": True,
}


@pytest.fixture(scope="module", params=[tiny_llama, tiny_gemma3], ids=["llama", "gemma3"])
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    twin = request.param()
    return twin, write_folder(twin, tmp_path_factory.mktemp("model"))


@torch.no_grad()
def expected_logits(twin: Any, token_ids: list[int]) -> torch.Tensor:
    return twin(torch.tensor([token_ids])).logits[0].float()


def check(twin: Any, output: RequestOutput, *, index: int = 0) -> None:
    """Compare everything that a request for everything got."""
    assert output.error is None
    prompt, sample = output.prompt_token_ids, output.outputs[index]
    logits = expected_logits(twin, prompt + sample.token_ids)
    torch.testing.assert_close(output.context_logits, logits[: len(prompt)], **TOLERANCE)
    torch.testing.assert_close(sample.generation_logits, logits[len(prompt) - 1 : -1], **TOLERANCE)
    logprobs = logits.log_softmax(-1)
    assert output.prompt_logprobs is not None and len(output.prompt_logprobs) == len(prompt)
    assert output.prompt_logprobs[0] is None
    assert sample.logprobs is not None and len(sample.logprobs) == len(sample.token_ids)
    positions = [*output.prompt_logprobs[1:], *sample.logprobs]
    num_top = [3] * (len(prompt) - 1) + [2] * len(sample.token_ids)
    for at, (entry, token) in enumerate(zip(positions, (prompt + sample.token_ids)[1:], strict=True)):
        assert entry is not None
        wanted = {*logprobs[at].topk(num_top[at]).indices.tolist(), token}
        assert entry.keys() == wanted
        for token_id, found in entry.items():
            assert found.logprob == pytest.approx(logprobs[at, token_id].item(), abs=1e-3)
        assert entry[token].rank == int((logprobs[at] > logprobs[at, token]).sum()) + 1
        assert entry[token].decoded_token is not None


@pytest.mark.parametrize("max_num_tokens", [7, 2048], ids=["chunks", "whole"])
@pytest.mark.parametrize("overlap", [False, True], ids=["plain", "overlapped"])
def test_everything_at_once_equals_transformers(
    subject: tuple[Any, Path], max_num_tokens: int, overlap: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    twin, folder = subject
    # Parts of 5 positions, so that chunks are cut too.
    monkeypatch.setattr(wanted_logits, "MAX_PART_BYTES", 5 * 4 * VOCAB)
    prompts = [prompt_ids(n, seed=n) for n in (1, 2, 23, 40)]
    params = SamplingParams(max_tokens=5, **EVERYTHING)
    with LLM(folder, max_num_tokens=max_num_tokens, disable_overlap_scheduler=not overlap) as llm:
        for output in llm.generate(prompts, params):
            check(twin, output)
        stats = llm.get_stats()
    assert (stats["num_chunks"] > len(prompts)) == (max_num_tokens == 7)


def test_a_cached_prompt_is_computed_again(subject: tuple[Any, Path]) -> None:
    twin, folder = subject
    prompt = prompt_ids(70, seed=3)
    with LLM(folder) as llm:
        llm.generate(prompt, SamplingParams(max_tokens=2))
        output = llm.generate(prompt, SamplingParams(max_tokens=2, **EVERYTHING))
        own = {"return_generation_logits": True, "ignore_eos": True}
        cached = llm.generate(prompt, SamplingParams(max_tokens=2, **own))
    check(twin, output)
    assert output.num_cached_tokens == 0 and cached.num_cached_tokens > 0
    torch.testing.assert_close(
        cached.outputs[0].generation_logits, output.outputs[0].generation_logits, **TOLERANCE
    )
    assert cached.context_logits is None and cached.prompt_logprobs is None


def test_n_samples_share_the_prompts_logits(subject: tuple[Any, Path]) -> None:
    twin, folder = subject
    params = SamplingParams(max_tokens=4, n=3, temperature=8.0, seed=1, **EVERYTHING)
    with LLM(folder) as llm:
        output = llm.generate(prompt_ids(40, seed=4), params)
    assert len({tuple(sample.token_ids) for sample in output.outputs}) == 3
    for index in range(3):
        check(twin, output, index=index)


def test_preemption_neither_loses_nor_repeats_a_position(subject: tuple[Any, Path]) -> None:
    twin, folder = subject
    prompts = [prompt_ids(40, seed=50 + i) for i in range(4)]
    small = KvCacheConfig(max_tokens=128, tokens_per_block=8)
    with LLM(folder, kv_cache_config=small, max_num_tokens=32, disable_overlap_scheduler=False) as llm:
        outputs = llm.generate(prompts, SamplingParams(max_tokens=30, **EVERYTHING))
        stats = llm.get_stats()
    assert stats["num_preemptions"] > 0
    for output in outputs:
        assert len(output.outputs[0].token_ids) == 30
        check(twin, output)


def test_stop_strings_cut_the_logits_too(subject: tuple[Any, Path]) -> None:
    twin, folder = subject
    prompt = prompt_ids(12, seed=6)
    with LLM(folder, disable_overlap_scheduler=False) as llm:
        whole = llm.generate(prompt, SamplingParams(max_tokens=12, ignore_eos=True))
        stop = byte_tokenizer().decode(whole.outputs[0].token_ids[4:5])
        output = llm.generate(prompt, SamplingParams(max_tokens=12, stop=stop, **EVERYTHING))
    assert output.outputs[0].finish_reason == "stop"
    assert len(output.outputs[0].generation_logits) == len(output.outputs[0].token_ids) < 12
    check(twin, output)


def test_streams_show_what_is_complete(subject: tuple[Any, Path]) -> None:
    twin, folder = subject
    params = SamplingParams(max_tokens=6, **EVERYTHING)
    with LLM(folder, max_num_tokens=16) as llm:
        updates = list(llm.generate_async(prompt_ids(40, seed=8), params, streaming=True))
    assert len(updates) == 6
    assert all(update.prompt_logprobs is not None for update in updates)
    assert [update.outputs[0].generation_logits is None for update in updates] == [True] * 5 + [False]
    check(twin, updates[-1])


def test_who_asks_for_nothing_gets_nothing(subject: tuple[Any, Path]) -> None:
    _, folder = subject
    with LLM(folder) as llm:
        output = llm.generate(prompt_ids(10, seed=9), SamplingParams(max_tokens=2))
    assert output.prompt_logprobs is None and output.context_logits is None
    assert output.outputs[0].generation_logits is None


def test_logits_of_many_positions_are_made_in_parts(
    subject: tuple[Any, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long the prompt, no more than a part's logits lie on the device."""
    _, folder = subject
    monkeypatch.setattr(wanted_logits, "MAX_PART_BYTES", 16 * 4 * VOCAB)
    assembly = assemble(EngineConfig(model=folder))
    engine = assembly.engine
    real, widths = engine.runner.model.logits, []

    def logits(hidden_RD: torch.Tensor) -> torch.Tensor:
        widths.append(len(hidden_RD))
        return real(hidden_RD)

    monkeypatch.setattr(engine.runner.model, "logits", logits)
    params = SamplingParams(max_tokens=1, prompt_logprobs=0)
    request = Request.create(prompt_ids(100, seed=1), params, assembly.limits, request_id="r")
    processor, outputs = OutputProcessor(None), []
    processor.add(request, outputs.append)
    engine.submit(request)
    while engine.has_work:
        processor.process(engine.step())
    assert sorted(widths) == [1, 4, *[16] * 6]
    entries = outputs[0].prompt_logprobs
    assert [list(entry) for entry in entries[1:]] == [[token] for token in request.prompt_token_ids[1:]]
