"""Are logprobs the same bits whatever else is in a step, and is the promise refused where it cannot be kept?

Each prompt runs alone first; then in batches, chunks, after prefix hits, preempted, and with other threads.
Without the option the same comparison fails, which shows that it sees a difference.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from slipstream import LLM, KvCacheConfig, SamplingParams
from slipstream.core.errors import ConfigError
from slipstream.engine.config import EngineConfig
from slipstream.engine.resolution import ModelFacts, resolve
from slipstream.kernels import KernelCapability, register_kernel, unregister_kernel
from slipstream.kernels.cpu.library import library
from slipstream.kernels.cpu.threads import use_threads
from slipstream.kernels.silu_and_mul import silu_and_mul
from tests.engine.tiny import prompt_ids, tiny_gemma3, tiny_llama, write_folder
from tests.models.gguf_twins import write_gguf

PROMPTS = [
    *(prompt_ids(3 + 17 * i, seed=i) for i in range(5)),
    *(prompt_ids(45, seed=20) + prompt_ids(2 + i, seed=30 + i) for i in range(4)),
]
NO_REUSE = KvCacheConfig(enable_block_reuse=False)
FACTS = ModelFacts(vocab_size=100, max_position_embeddings=64, dtype="bfloat16")
Bits = list[list[tuple[int, float]]]


def params(i: int, *, has_prompt: bool) -> SamplingParams:
    prompt = {"prompt_logprobs": 2} if has_prompt else {}
    return SamplingParams(max_tokens=12 + i % 4, ignore_eos=True, logprobs=3, **prompt)


def bits_of(llm: LLM, which: list[int], *, has_prompt: bool = False) -> dict[int, Bits]:
    """Return every log-probability of these prompts, run together, as exact numbers."""
    asked = [params(i, has_prompt=has_prompt) for i in which]
    outputs = llm.generate([PROMPTS[i] for i in which], asked, raise_on_error=True)
    found: dict[int, Bits] = {}
    for i, output in zip(which, outputs, strict=True):
        steps = list(output.outputs[0].logprobs or ())
        steps += [step for step in output.prompt_logprobs or () if step is not None]
        found[i] = [sorted((token, one.logprob) for token, one in step.items()) for step in steps]
        assert len(found[i]) >= 12 + i % 4
    return found


def start(model: Path, **options: Any) -> LLM:
    return LLM(model, skip_tokenizer_init=True, **({"batch_invariant": True} | options))


@pytest.fixture(scope="module", params=["float32", "gguf", "windows"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    if request.param == "gguf":
        return write_gguf(tiny_llama(), folder / "tiny.gguf", quantize=True)
    return write_folder(tiny_llama() if request.param == "float32" else tiny_gemma3(), folder)


@pytest.fixture(scope="module")
def alone(model: Path) -> dict[int, Bits]:
    with start(model, kv_cache_config=NO_REUSE) as llm:
        is_gguf = model.suffix == ".gguf"
        resolved = llm.startup.resolved
        assert resolved.batch_invariant and resolved.quantization == ("gguf" if is_gguf else "float32")
        assert resolved.kv_dtype == ("float16" if is_gguf else "float32")
        found: dict[int, Bits] = {}
        for i in range(len(PROMPTS)):
            found |= bits_of(llm, [i])
    assert len({repr(bits) for bits in found.values()}) == len(PROMPTS)
    return found


@pytest.mark.parametrize(
    ("options", "counter"),
    [
        ({"max_num_tokens": 24, "max_batch_size": 8, "kv_cache_config": NO_REUSE}, "num_chunks"),
        ({"max_batch_size": 9}, "num_cached_tokens"),
        ({"kv_cache_config": KvCacheConfig(max_tokens=88, tokens_per_block=8)}, "num_preemptions"),
        ({"disable_overlap_scheduler": False}, "max_outstanding"),
    ],
    ids=["batches and chunks", "prefix hits", "preemption", "steps in flight"],
)
def test_bits_do_not_depend_on(
    model: Path, alone: dict[int, Bits], options: dict[str, Any], counter: str
) -> None:
    with start(model, **options) as llm:
        given = bits_of(llm, list(range(len(PROMPTS))))
        assert llm.get_stats()[counter] > (1 if counter == "max_outstanding" else 0)
    assert given == alone


def test_bits_do_not_depend_on_threads(model: Path, alone: dict[int, Bits]) -> None:
    before = library().ss_num_threads()
    with start(model) as llm:
        library().ss_set_threads(2 if before != 2 else 1)
        try:
            assert bits_of(llm, [1, 4, 6]) == {i: alone[i] for i in (1, 4, 6)}
        finally:
            use_threads()


def test_bits_of_prompts_do_not_depend_on_chunks(model: Path) -> None:
    with start(model, kv_cache_config=NO_REUSE) as llm:
        expected = bits_of(llm, [3], has_prompt=True) | bits_of(llm, [8], has_prompt=True)
    with start(model, kv_cache_config=NO_REUSE, max_num_tokens=10, max_batch_size=4) as llm:
        assert bits_of(llm, [3, 8], has_prompt=True) == expected


def test_without_the_option_bits_do_depend_on_the_batch(tmp_path: Path) -> None:
    folder = write_folder(tiny_llama(), tmp_path)
    options = {"batch_invariant": False, "kv_cache_config": NO_REUSE}
    with start(folder, **options) as llm:
        assert llm.startup.resolved.quantization == "unquantized"
        lone = bits_of(llm, [4]) | bits_of(llm, [7])
    with start(folder, max_num_tokens=24, max_batch_size=8, **options) as llm:
        given = bits_of(llm, list(range(len(PROMPTS))))
    assert {i: given[i] for i in (4, 7)} != lone


def test_the_bits_are_those_of_the_model(tmp_path: Path) -> None:
    """Not only equal among themselves: within rounding of plain float32."""
    folder = write_folder(tiny_llama(), tmp_path)
    with start(folder) as llm, start(folder, batch_invariant=False) as plain:
        given, expected = bits_of(llm, [2])[2], bits_of(plain, [2])[2]
    flat = [[value for step in bits for _, value in step] for bits in (given, expected)]
    assert [t for step in given for t, _ in step] == [t for step in expected for t, _ in step]
    torch.testing.assert_close(torch.tensor(flat[0]), torch.tensor(flat[1]), rtol=1e-4, atol=1e-3)


def test_a_model_without_a_native_form_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_folder(tiny_llama(), tmp_path)
    monkeypatch.setattr("slipstream.models.dense_decoder.find_native_decoder", lambda *parts: None)
    with pytest.raises(ConfigError, match="the layers of Llama do not run as native calls"):
        start(folder)


def test_an_attention_backend_that_cannot_is_refused(tmp_path: Path) -> None:
    folder = write_folder(tiny_llama(), tmp_path)
    with pytest.raises(
        ConfigError, match=r"'torch' cannot be used: batch_invariant=True.*Use 'cpu', or 'auto'"
    ):
        start(folder, attn_backend="torch")


def test_a_kernel_from_outside_has_to_promise_it_too(tmp_path: Path) -> None:
    folder = write_folder(tiny_llama(), tmp_path)
    capability = KernelCapability(devices=frozenset({"cpu"}))
    register_kernel(silu_and_mul, op="silu_and_mul", name="mine", capability=capability)
    try:
        with pytest.raises(ConfigError, match="the kernel 'mine' for silu_and_mul does not promise it"):
            start(folder)
    finally:
        unregister_kernel("mine")


@pytest.mark.parametrize(
    ("options", "obstacle", "complaint"),
    [
        ({"dtype": "bfloat16"}, "", "computes in float32 on a CPU"),
        ({}, "no compiler.", "needs the CPU kernels: no compiler."),
        ({"quant_config": "fixed_tiles"}, "", "'fixed_tiles' does not run on 'cpu'"),
    ],
)
def test_what_a_cpu_cannot_promise_is_refused(options: dict[str, Any], obstacle: str, complaint: str) -> None:
    config = EngineConfig(model="m", batch_invariant=True, **options)
    with pytest.raises(ConfigError, match=complaint):
        resolve(config, FACTS, has_cuda=False, native_obstacle=obstacle)


def test_schemes_follow_device_and_file() -> None:
    def scheme(has_cuda: bool, *, is_quantized: bool = False, **options: Any) -> str:
        facts = ModelFacts(
            vocab_size=100, max_position_embeddings=64, dtype="bfloat16", is_quantized=is_quantized
        )
        return resolve(EngineConfig(model="m", **options), facts, has_cuda=has_cuda).quantization

    assert scheme(False, batch_invariant=True) == "float32"
    assert scheme(False, batch_invariant=True, is_quantized=True) == "gguf"
    assert scheme(False, batch_invariant=True, is_quantized=True, dtype="float32") == "float32"
    assert scheme(False, batch_invariant=True, quant_config="int8") == "int8"
    assert scheme(True, batch_invariant=True) == "fixed_tiles"
    assert scheme(True) == scheme(False) == "unquantized"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_bits_on_a_gpu(tmp_path: Path, dtype: str) -> None:
    folder = write_folder(tiny_llama(), tmp_path)
    options = {"device": "cuda", "dtype": dtype}
    with start(folder, kv_cache_config=NO_REUSE, **options) as llm:
        resolved = llm.startup.resolved
        assert resolved.quantization == "fixed_tiles" and resolved.batch_invariant
        assert type(llm.startup.engine.runner.backend).__name__ == "TritonInvariant"
        expected: dict[int, Bits] = {}
        for i in range(len(PROMPTS)):
            expected |= bits_of(llm, [i])
    for more in (
        {"max_num_tokens": 24, "max_batch_size": 8, "kv_cache_config": NO_REUSE},
        {"enforce_eager": True},
        {"kv_cache_config": KvCacheConfig(max_tokens=120, tokens_per_block=8)},
    ):
        with start(folder, **options, **more) as llm:
            assert bits_of(llm, list(range(len(PROMPTS)))) == expected, more


@pytest.mark.gpu
def test_windows_on_a_gpu_are_refused(tmp_path: Path) -> None:
    folder = write_folder(tiny_gemma3(), tmp_path)
    with pytest.raises(ConfigError, match="triton_invariant: it serves full groups"):
        start(folder, device="cuda")
