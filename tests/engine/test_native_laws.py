"""Does the native path of a CPU keep law 1? With packed weights and fp16 pages, the same tokens come out.

Each request runs alone first. Bit-equal logits are the business of `tests/layers/test_native_block.py`; here
tokens are compared through the whole engine, and a counter shows that the native path made them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from slipstream import LLM, KvCacheConfig, SamplingParams
from slipstream.core.errors import ConfigError
from slipstream.engine import assembly
from slipstream.kernels.cpu.unavailable import LibraryUnavailable
from tests.engine.tiny import prompt_ids, tiny_gemma3, tiny_llama
from tests.models.gguf_twins import write_gguf

PROMPTS = [
    *(prompt_ids(3 + 17 * i, seed=i) for i in range(6)),
    *(prompt_ids(45, seed=20) + prompt_ids(2 + i, seed=30 + i) for i in range(6)),
]
PARAMS = [SamplingParams(max_tokens=20 + i % 5, ignore_eos=True) for i in range(len(PROMPTS))]
NO_REUSE = KvCacheConfig(enable_block_reuse=False)


@pytest.fixture(scope="module", params=[tiny_llama, tiny_gemma3], ids=["llama", "gemma3"])
def file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(request.param(), tmp_path_factory.mktemp("model") / "tiny.gguf", quantize=True)


@pytest.fixture(scope="module")
def alone(file: Path) -> Iterator[list[list[int]]]:
    with LLM(file, skip_tokenizer_init=True, kv_cache_config=NO_REUSE) as llm:
        resolved = llm.startup.resolved
        assert (resolved.quantization, resolved.kv_dtype) == ("gguf", "float16")
        yield [tokens_of(llm, [p], [s])[0] for p, s in zip(PROMPTS, PARAMS, strict=True)]
        assert llm.get_stats()["num_native_steps"] > 0


def tokens_of(llm: LLM, prompts: list[list[int]], params: list[SamplingParams]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in llm.generate(prompts, params, raise_on_error=True)]


@pytest.mark.parametrize(
    ("arguments", "counter"),
    [
        ({"max_num_tokens": 32, "max_batch_size": 8, "kv_cache_config": NO_REUSE}, "num_chunks"),
        ({"max_batch_size": 12}, "num_cached_tokens"),
        ({"kv_cache_config": KvCacheConfig(max_tokens=120, tokens_per_block=8)}, "num_preemptions"),
        ({"disable_overlap_scheduler": False}, "max_outstanding"),
    ],
    ids=["batches and chunks", "prefix hits", "preemption", "steps in flight"],
)
def test_tokens_do_not_depend_on(
    file: Path, alone: list[list[int]], arguments: dict[str, Any], counter: str
) -> None:
    with LLM(file, skip_tokenizer_init=True, **arguments) as llm:
        given = tokens_of(llm, PROMPTS, PARAMS)
        stats = llm.get_stats()
    assert stats[counter] > (len(PROMPTS) if counter == "num_chunks" else 0)
    assert stats["num_native_steps"] == stats["num_plans"]
    assert given == alone
    assert min(len(set(tokens)) for tokens in alone) >= 8


def test_float32_is_one_flag_away(file: Path) -> None:
    with LLM(file, skip_tokenizer_init=True, dtype="float32") as llm:
        assert (llm.startup.resolved.quantization, llm.startup.resolved.kv_dtype) == (
            "unquantized",
            "float32",
        )
        assert llm.generate([PROMPTS[0]], PARAMS[0])[0].error is None
        assert llm.get_stats()["num_native_steps"] == 0


def test_without_the_library_plain_torch_runs_and_says_so(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> Any:
        raise LibraryUnavailable("there is no compiler.", "Install g++.")

    monkeypatch.setattr(assembly, "library", refuse)
    with LLM(file, skip_tokenizer_init=True) as llm:
        assert llm.startup.resolved.quantization == "unquantized"
        assert any("Install g++." in line for line in llm.startup.report)
        assert llm.generate([PROMPTS[0]], PARAMS[0])[0].error is None
    with pytest.raises(ConfigError, match=r"quantization='int8' needs the CPU kernels: .*Install g\+\+"):
        LLM(file, skip_tokenizer_init=True, quantization="int8")


def test_a_quantised_file_is_not_quantised_again(file: Path) -> None:
    with pytest.raises(Exception, match="it is quantised already; leave quantization unset"):
        LLM(file, skip_tokenizer_init=True, quantization="int8")


def test_bad_values_are_refused_by_name(file: Path) -> None:
    with pytest.raises(ConfigError, match=r"quantization scheme 'int7'; valid: .*int8"):
        LLM(file, skip_tokenizer_init=True, quantization="int7")
    with pytest.raises(ConfigError, match="computes in float32"):
        LLM(file, skip_tokenizer_init=True, quantization="gguf", dtype="bfloat16")
