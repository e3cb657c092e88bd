"""Are embeddings the pooled hidden states that transformers computes, however a prompt is cut and batched?"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from slipstream import LLM, AsyncLLM, KvCacheConfig, SamplingParams
from slipstream.core.errors import ConfigError, RequestError
from tests.engine.tiny import VOCAB, prompt_ids, tiny_gemma3, tiny_llama, write_folder

PROMPTS = [prompt_ids(length, seed=length) for length in (1, 7, 33, 40, 100, 33)]
OPTIONS: dict[str, Any] = {"device": "cpu", "dtype": "float32", "max_seq_len": 256}
# 100 tokens run as chunks of at most 16; the batch of six shares them.
CHUNKED = {"max_num_tokens": 16, "max_batch_size": 4}
# Hidden states after the norm are about 1 (llama) to 50 (gemma) here; float32 sums in another order differ by
# some 1e-6 of that.
TOLERANCE = 1e-4


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    twin = {"llama": tiny_llama, "gemma3": tiny_gemma3}[request.param]()
    return write_folder(twin, tmp_path_factory.mktemp("model")), twin


@torch.no_grad()
def last_hidden_state(twin: Any, prompt: list[int]) -> np.ndarray:
    return twin.model(torch.tensor([prompt])).last_hidden_state[0].float().numpy()


def expected_vector(twin: Any, prompt: list[int], pooling: str) -> np.ndarray:
    states = last_hidden_state(twin, prompt)
    return {"mean": states.mean(0), "last": states[-1], "cls": states[0]}[pooling]


@pytest.mark.parametrize("options", [{}, CHUNKED], ids=["whole", "chunked"])
def test_embeddings_are_those_of_transformers(subject: tuple[Path, Any], options: dict[str, Any]) -> None:
    folder, twin = subject
    with LLM(folder, **OPTIONS, **options) as llm:
        for pooling in ("mean", "last", "cls"):
            outputs = llm.encode(PROMPTS, pooling=pooling)
            for prompt, output in zip(PROMPTS, outputs, strict=True):
                expected = expected_vector(twin, prompt, pooling)
                assert output.error is None and output.prompt_token_ids == prompt
                assert output.embedding.dtype == np.float32 and output.embedding.shape == expected.shape
                scale = max(1.0, float(np.abs(expected).max()))
                np.testing.assert_allclose(output.embedding, expected, rtol=0, atol=TOLERANCE * scale)
        stats = llm.get_stats()
        assert (stats["num_chunks"] > 3 * len(PROMPTS)) == bool(options)
        assert stats["num_free_pages"] == stats["num_pages"]


def test_prompts_that_were_embedded_before_are_computed_again(subject: tuple[Path, Any]) -> None:
    """A prefix hit would skip hidden states; every position has to run, and shows the same vector."""
    folder, _ = subject
    with LLM(folder, **OPTIONS) as llm:
        first = llm.encode(PROMPTS[4])
        llm.generate(PROMPTS[4], SamplingParams(max_tokens=2))
        before = llm.get_stats()["executed_tokens"]
        again = llm.encode(PROMPTS[4])
        assert llm.get_stats()["executed_tokens"] - before == len(PROMPTS[4])
    # Alone both times: the very same operations.
    np.testing.assert_array_equal(first.embedding, again.embedding)


def test_embedding_beside_generation_changes_neither(subject: tuple[Path, Any]) -> None:
    folder, twin = subject
    params = SamplingParams(max_tokens=30, ignore_eos=True)
    with LLM(folder, **OPTIONS, **CHUNKED) as llm:
        alone = llm.generate(PROMPTS[3], params).outputs[0].token_ids
        running = llm.generate_async(prompt_ids(40, seed=40), params)
        output = llm.encode(PROMPTS[4], pooling="last")
        assert running.result(60.0).outputs[0].token_ids == alone
    expected = expected_vector(twin, PROMPTS[4], "last")
    scale = max(1.0, float(np.abs(expected).max()))
    np.testing.assert_allclose(output.embedding, expected, rtol=0, atol=TOLERANCE * scale)


def test_a_preempted_prompt_brings_each_position_once(subject: tuple[Path, Any]) -> None:
    """Under a pool for little more than one prompt, embeddings and generations push each other out."""
    folder, twin = subject
    options = OPTIONS | {
        "max_seq_len": 120,
        "kv_cache_config": KvCacheConfig(max_tokens=160, tokens_per_block=8),
    }
    with LLM(folder, **options, **CHUNKED) as llm:
        params = SamplingParams(max_tokens=60, ignore_eos=True)
        running = [llm.generate_async(prompt_ids(20, seed=i), params) for i in range(4)]
        outputs = llm.encode([PROMPTS[4]] * 3)
        assert all(generation.result(60.0).error is None for generation in running)
        assert llm.get_stats()["num_preemptions"] > 0
    expected = expected_vector(twin, PROMPTS[4], "mean")
    scale = max(1.0, float(np.abs(expected).max()))
    for output in outputs:
        np.testing.assert_allclose(output.embedding, expected, rtol=0, atol=TOLERANCE * scale)


def test_normalize_text_and_errors_of_single_prompts(subject: tuple[Path, Any]) -> None:
    folder, _ = subject
    with LLM(folder, **OPTIONS) as llm:
        plain, unit = llm.encode("ba de"), llm.encode("ba de", normalize=True)
        assert plain.prompt == "ba de" and not np.isclose(np.linalg.norm(plain.embedding), 1.0, atol=1e-3)
        # One rounding to float32 per element.
        assert np.isclose(np.linalg.norm(unit.embedding), 1.0, atol=1e-6)
        np.testing.assert_allclose(
            unit.embedding, plain.embedding / np.linalg.norm(plain.embedding), rtol=1e-5, atol=1e-6
        )
        bad, good = llm.encode([[VOCAB], [5, 6]])
        assert bad.embedding is None and isinstance(bad.error, RequestError)
        assert good.error is None and good.embedding is not None
        with pytest.raises(RequestError, match="vocabulary"):
            llm.encode([[VOCAB], [5, 6]], raise_on_error=True)
        with pytest.raises(ConfigError, match=r"'meam' is unknown; valid: .*Did you mean 'mean'"):
            llm.encode([5, 6], pooling="meam")


def test_async_encode_is_the_same(subject: tuple[Path, Any]) -> None:
    folder, _ = subject

    async def test() -> np.ndarray:
        async with AsyncLLM(folder, **OPTIONS) as llm:
            return (await llm.encode(PROMPTS[2], pooling="last")).embedding

    with LLM(folder, **OPTIONS) as llm:
        np.testing.assert_array_equal(asyncio.run(test()), llm.encode(PROMPTS[2], pooling="last").embedding)
