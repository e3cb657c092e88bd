"""Does the engine do on a GPU what it does on a CPU? Tokens, recorded outputs, an 8B model, the ledger.

One CUDA device of 40 GiB or more. Tokens are compared in float32 with TF32 off; the prompts are those of law
1, whose two best logits lie more than 1e-3 apart, while two float32 implementations differ by some 1e-4.
"""

from __future__ import annotations

import gc
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from slipstream import LLM, KvCacheConfig, SamplingParams
from slipstream.core.errors import ConfigError, OutOfMemoryError
from tests.engine.test_laws import GREEDY, PROMPTS
from tests.engine.test_reference_outputs import MAX_EXCUSED, assert_same, of_model, start
from tests.engine.tiny import tiny_gemma3, tiny_llama, write_folder

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
MIB = 2**20
# Prompts of up to 87 tokens in steps of 24: most run in chunks, and the batch never fits into one step.
CHUNKED = {"max_num_tokens": 24, "max_batch_size": 8}
LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
PARAMETERS_8B = 8_030_261_248


@pytest.fixture(autouse=True)
def exact_float32() -> Iterator[None]:
    """TF32 keeps 10 bits of a product's inputs, which no comparison of tokens survives."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.fixture(scope="module", params=[tiny_llama, tiny_gemma3], ids=["llama", "gemma3"])
def twin(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A tiny model and what each request generates alone on the CPU."""
    folder = write_folder(request.param(), tmp_path_factory.mktemp("model"))
    with LLM(folder, device="cpu", dtype="float32") as llm:
        alone = [llm.generate(p, s).outputs[0].token_ids for p, s in zip(PROMPTS, GREEDY, strict=True)]
    return folder, alone


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tiny_llama(), tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def folder_8b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama-8b")
    (folder / "config.json").write_text(json.dumps(LLAMA_8B))
    return folder


@pytest.mark.parametrize("is_overlap_off", [True, False], ids=["D=1", "D=2"])
@pytest.mark.parametrize("options", [{}, CHUNKED], ids=["whole", "chunked"])
def test_greedy_tokens_are_those_of_the_cpu(
    twin: tuple[Path, Any], options: dict[str, Any], is_overlap_off: bool
) -> None:
    folder, expected = twin
    settings = options | {"device": DEVICE, "dtype": "float32", "disable_overlap_scheduler": is_overlap_off}
    with LLM(folder, **settings) as llm:
        for _ in range(2):  # the second time from prefix hits
            outputs = llm.generate(PROMPTS, GREEDY, raise_on_error=True)
            assert [output.outputs[0].token_ids for output in outputs] == expected
        stats = llm.get_stats()
    assert stats["max_outstanding"] == (1 if is_overlap_off else 2)
    assert stats["num_cached_tokens"] > 0
    assert not options or stats["num_chunks"] > stats["num_admissions"]


@pytest.mark.parametrize("name", ["smollm2-135m-instruct-q4_1", "gemma-3-270m-q4_k_m"])
def test_recorded_outputs(name: str, reference_cases: list[dict[str, Any]]) -> None:
    path = Path(os.environ.get("SLIPSTREAM_TEST_MODELS") or ".models") / f"{name}.gguf"
    if not path.is_file():
        pytest.skip(f"{path} is not on this machine; set SLIPSTREAM_TEST_MODELS to the folder that holds it")
    cases = of_model(reference_cases, name)
    with LLM(path, device=DEVICE, dtype="float32", max_num_tokens=256, max_seq_len=2048) as llm:
        generations = [start(llm, case) for case in cases]
        outputs = [generation.result(timeout=200) for generation in generations]
    excused = sum(assert_same(output, case) for output, case in zip(outputs, cases, strict=True))
    assert excused <= MAX_EXCUSED


def test_an_8b_model_generates_in_bfloat16(folder_8b: Path) -> None:
    options = {"load_format": "dummy", "skip_tokenizer_init": True, "max_seq_len": 4096}
    with LLM(folder_8b, device=DEVICE, **options) as llm:
        assert llm.startup.resolved.dtype == "bfloat16" and llm.startup.resolved.depth == 2
        # The two norms of 32 layers and the last one stay in float32.
        assert llm.startup.weight_bytes == 2 * PARAMETERS_8B + 2 * 65 * 4096
        prompts = [[(7 * i + j) % 128_256 for j in range(20 + 100 * i)] for i in range(8)]
        params = SamplingParams(max_tokens=16, ignore_eos=True)
        outputs = llm.generate(prompts, params, raise_on_error=True)
        tokens = [output.outputs[0].token_ids for output in outputs]
        assert [len(ids) for ids in tokens] == [16] * 8
        assert len({token for ids in tokens for token in ids}) > 8
        # 8 KV heads of 128 in 32 layers, K and V in bfloat16.
        assert llm.startup.capacity.page_bytes == 32 * 2 * 32 * 8 * 128 * 2
        awake = torch.cuda.memory_allocated()
        llm.sleep(2)
        freed = awake - torch.cuda.memory_allocated()
        assert freed > 0.99 * (llm.startup.weight_bytes + llm.startup.capacity.pool_bytes)
        llm.wake_up()
        again = llm.generate(prompts[0], params, raise_on_error=True).outputs[0].token_ids
        assert len(again) == 16


SETTINGS = ["free_gpu_memory_fraction", "gpu_memory_utilization", "max_gpu_total_bytes"]


@pytest.mark.parametrize("setting", SETTINGS)
def test_memory_settings_resolve_to_one_ledger(folder: Path, setting: str) -> None:
    free_bytes, total_bytes = free_memory()
    used_share = 1 - free_bytes / total_bytes
    options: dict[str, Any]
    if setting == "free_gpu_memory_fraction":
        options = {"kv_cache_config": KvCacheConfig(free_gpu_memory_fraction=0.02)}
        expected = 0.02 * free_bytes
    elif setting == "gpu_memory_utilization":
        options = {"gpu_memory_utilization": used_share + 0.02}
        expected = 0.02 * total_bytes
    else:
        options = {"kv_cache_config": KvCacheConfig(max_gpu_total_bytes="256MiB")}
        expected = 256 * MIB
    with LLM(folder, device=DEVICE, dtype="float32", **options) as llm:
        capacity = llm.startup.capacity
        assert capacity.reason == setting
        if setting == "gpu_memory_utilization":
            # What this process may take holds its steps too, not the pages alone.
            ledger = llm.startup.ledger
            expected -= (ledger.workspace_bytes or 0) + ledger.graph_bytes + ledger.state_bytes
        # The model and what CUDA itself allocates for its first kernels lie between the two measurements.
        assert abs(capacity.pool_bytes - expected) < 64 * MIB
        assert capacity.pool_bytes == capacity.num_pages * capacity.page_bytes
        assert torch.cuda.memory_allocated() >= capacity.pool_bytes
        assert any(f"{capacity.pool_bytes:,} bytes" in line for line in llm.startup.report)
        assert llm.generate([5, 6], SamplingParams(max_tokens=4)).error is None


def test_out_of_memory_names_both_numbers(folder: Path) -> None:
    free_bytes, total_bytes = free_memory()
    tokens = 10**9
    with pytest.raises(OutOfMemoryError, match=r"max_tokens=1000000000") as refused:
        LLM(folder, device=DEVICE, dtype="float32", kv_cache_config=KvCacheConfig(max_tokens=tokens))
    needed, there = numbers_of(str(refused.value))
    assert needed > total_bytes > there > 0.5 * free_bytes
    with pytest.raises(OutOfMemoryError, match="gpu_memory_utilization") as refused:
        LLM(folder, device=DEVICE, dtype="float32", gpu_memory_utilization=1e-4)
    needed, there = numbers_of(str(refused.value))
    assert needed > there
    with pytest.raises(ConfigError, match="gpu_memory_utilization"):
        LLM(folder, device="cpu", gpu_memory_utilization=0.5)
    # What was refused holds nothing.
    assert abs(free_memory()[0] - free_bytes) < 64 * MIB


def numbers_of(message: str) -> tuple[int, int]:
    """Return the byte counts a message names: the first two numbers written with separators, or a lone 0."""
    found = [int(text.replace(",", "")) for text in re.findall(r"\b\d{1,3}(?:,\d{3})+\b|\b0\b", message)]
    assert len(found) >= 2, message
    return found[0], found[1]


def free_memory() -> tuple[int, int]:
    """Return (free, total) bytes once nothing that is unused is kept back; starts CUDA if need be."""
    torch.zeros(1, device=DEVICE)
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()


def test_twenty_lives_give_their_memory_back(folder: Path) -> None:
    options = {"kv_cache_config": KvCacheConfig(max_gpu_total_bytes="256MiB")}

    def use() -> None:
        with LLM(folder, device=DEVICE, dtype="float32", **options) as llm:
            assert llm.generate([5, 6], SamplingParams(max_tokens=4)).error is None

    use()
    before = free_memory()[0]
    for _ in range(20):
        use()
    assert before - free_memory()[0] < 64 * MIB
