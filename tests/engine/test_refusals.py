"""Is what a backend cannot do refused before a weight is read, naming what would work instead?

And where a step's result cannot even be read, as after a fault of the device: does everybody hear of it?
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from slipstream import LLM, KvCacheConfig, SamplingParams
from slipstream.attention import registry
from slipstream.attention.base import AttentionCapability
from slipstream.attention.cpu import CpuPaged
from slipstream.attention.registry import DeviceFacts, choose_backend
from slipstream.attention.torch_reference import TorchReference
from slipstream.core.cache_group import CacheGroup
from slipstream.core.errors import ConfigError, EngineError
from slipstream.engine import assembly
from tests.engine.tiny import tiny_llama, write_folder

GROUP = CacheGroup(layers=(0,), kind="full", heads=2, head_dim=64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tiny_llama(), tmp_path_factory.mktemp("model"))


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*arguments: Any, **options: Any) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(assembly, "load_weights", read)


def limited(monkeypatch: pytest.MonkeyPatch, **limits: Any) -> None:
    """Let the CPU's own backend be one with these limits."""
    monkeypatch.setattr(CpuPaged, "capability", dataclasses.replace(CpuPaged.capability, **limits))


@pytest.mark.parametrize(
    ("limits", "options", "complaint"),
    [
        ({"head_dims": frozenset({128})}, {}, r"head sizes \[128\], and this model has 16"),
        ({"page_sizes": frozenset({16})}, {}, r"\[16\] tokens per block, and 32 are set"),
        ({}, {"dtype": "bfloat16"}, r"keys and values of float16, float32, not bfloat16"),
    ],
)
def test_a_backend_asked_for_by_name(
    folder: Path,
    no_weights: None,
    monkeypatch: pytest.MonkeyPatch,
    limits: dict[str, Any],
    options: dict[str, Any],
    complaint: str,
) -> None:
    limited(monkeypatch, **limits)
    with pytest.raises(ConfigError, match=complaint) as refused:
        LLM(folder, attn_backend="cpu", **options)
    assert "Use 'torch', or 'auto' to let us choose." in str(refused.value)


def test_auto_takes_the_next_and_says_why(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limited(monkeypatch, page_sizes=frozenset({16}))
    with LLM(folder, skip_tokenizer_init=True) as llm:
        assert isinstance(llm.startup.engine.runner.backend, TorchReference)
        assert any("passed over: cpu: it serves [16] tokens per block" in line for line in llm.startup.report)
    sizes = KvCacheConfig(tokens_per_block=16)
    with LLM(folder, skip_tokenizer_init=True, kv_cache_config=sizes) as llm:
        assert isinstance(llm.startup.engine.runner.backend, CpuPaged)


@pytest.mark.parametrize(
    ("capability", "facts", "advice"),
    [
        (
            AttentionCapability(devices=frozenset({"cpu"})),
            DeviceFacts(device="cuda", sm=70),
            "With device='cpu', 'cpu' or 'torch' would.",
        ),
        (
            AttentionCapability(kv_dtypes=frozenset({"float32"})),
            DeviceFacts(device="cpu", dtype="float8_e4m3fn"),
            "With dtype='float32', 'cpu' or 'torch' would.",
        ),
        (
            AttentionCapability(head_dims=frozenset({32})),
            DeviceFacts(device="cpu", native_obstacle="x"),
            "With device='cuda', 'triton' or 'triton_invariant' would.",
        ),
        (
            AttentionCapability(devices=frozenset({"cpu"}), head_dims=frozenset({32})),
            DeviceFacts(device="cuda", has_triton=False, native_obstacle="x"),
            "",
        ),
    ],
)
def test_where_none_serves_the_nearest_change_is_named(
    monkeypatch: pytest.MonkeyPatch, capability: AttentionCapability, facts: DeviceFacts, advice: str
) -> None:
    monkeypatch.setattr(TorchReference, "capability", capability)
    with pytest.raises(ConfigError) as refused:
        choose_backend("auto", facts, [GROUP])
    message = str(refused.value)
    assert message.startswith(f"No attention backend serves this model on {facts.kind}: ")
    assert message.endswith(advice) and ("would" in message) == bool(advice)
    assert set(registry.DEVICES) == {"cpu", "cuda"}


def test_a_device_that_fails_ends_everything_cleanly(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU says of a broken kernel comes when a result is read, and never goes away again."""
    with LLM(folder, skip_tokenizer_init=True) as llm:
        runner = llm.startup.engine.runner

        def broken(handle: Any) -> None:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

        monkeypatch.setattr(runner, "collect", broken)
        params = SamplingParams(max_tokens=4, ignore_eos=True)
        outputs = llm.generate([[1, 2], [3, 4, 5]], params)
        assert all(output.error is not None and output.finished for output in outputs)
        assert {output.error.code for output in outputs} == {"engine_stopped"}
        with pytest.raises(EngineError, match="The engine stopped: RuntimeError: CUDA error"):
            llm.generate([[1, 2]], params)
