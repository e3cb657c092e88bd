"""Does a checkpoint find its class, and does an unknown one hear what there is?"""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import pytest

from slipstream.core.errors import CheckpointError, ConfigError
from slipstream.models.gemma3 import Gemma3
from slipstream.models.gptj import GPTJ
from slipstream.models.llama import Llama
from slipstream.models.mistral import Mistral
from slipstream.models.qwen2 import Qwen2
from slipstream.models.qwen3 import Qwen3
from slipstream.models.registry import ARCHITECTURES, architecture_of, model_class, register_model


def checkpoint(format: str, config: dict[str, Any]) -> Any:
    return types.SimpleNamespace(format=format, config=config, path=Path("some-model"))


@pytest.mark.parametrize(
    ("format", "config", "expected"),
    [
        ("hf", {"architectures": ["LlamaForCausalLM"]}, Llama),
        ("hf", {"architectures": ["Gemma3ForCausalLM"]}, Gemma3),
        ("hf", {"architectures": ["MistralForCausalLM"]}, Mistral),
        ("hf", {"architectures": ["Qwen2ForCausalLM"]}, Qwen2),
        ("hf", {"architectures": ["Qwen3ForCausalLM"]}, Qwen3),
        ("hf", {"architectures": ["GPTJForCausalLM"]}, GPTJ),
        ("gguf", {"general.architecture": "llama"}, Llama),
        ("gguf", {"general.architecture": "gemma3"}, Gemma3),
        ("gguf", {"general.architecture": "qwen2"}, Qwen2),
        ("gguf", {"general.architecture": "qwen3"}, Qwen3),
        ("gguf", {"general.architecture": "gptj"}, GPTJ),
    ],
)
def test_known_names_find_their_class(format: str, config: dict[str, Any], expected: type) -> None:
    assert model_class(checkpoint(format, config)) is expected


@pytest.mark.parametrize(
    ("format", "config", "match"),
    [
        ("hf", {"architectures": ["LamaForCausalLM"]}, "Did you mean 'LlamaForCausalLM'"),
        ("hf", {"architectures": [7]}, "7"),
        ("hf", {"architectures": []}, "architectures"),
        ("hf", {}, "architectures"),
        ("gguf", {"general.architecture": "lama"}, "Did you mean 'llama'"),
        ("gguf", {}, "general.architecture"),
    ],
)
def test_unknown_names_are_refused_with_the_valid_ones(
    format: str, config: dict[str, Any], match: str
) -> None:
    with pytest.raises(CheckpointError, match=match):
        architecture_of(checkpoint(format, config))


def test_outside_classes_register_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ARCHITECTURES, "_rows", dict(ARCHITECTURES._rows))

    class Mine:
        pass

    register_model("MineForCausalLM", Mine)
    assert model_class(checkpoint("hf", {"architectures": ["MineForCausalLM"]})) is Mine
    with pytest.raises(ConfigError, match="already registered"):
        register_model("MineForCausalLM", Llama)
    with pytest.raises(ConfigError, match="already registered"):
        register_model("LlamaForCausalLM", Mine)
