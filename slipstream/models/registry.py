"""Which model class serves a checkpoint? A table of architectures, open to classes from outside."""

from __future__ import annotations

from typing import Any

from slipstream.checkpoint.base import Checkpoint
from slipstream.checkpoint.fields import require
from slipstream.core.errors import CheckpointError, nearest
from slipstream.core.registry import Registry

ARCHITECTURES = Registry(
    "model architecture",
    {
        "LlamaForCausalLM": "slipstream.models.llama:Llama",
        "MistralForCausalLM": "slipstream.models.mistral:Mistral",
        "Qwen2ForCausalLM": "slipstream.models.qwen2:Qwen2",
        "Qwen3ForCausalLM": "slipstream.models.qwen3:Qwen3",
        "Gemma3ForCausalLM": "slipstream.models.gemma3:Gemma3",
        "GPTJForCausalLM": "slipstream.models.gptj:GPTJ",
    },
)

# `general.architecture` of a GGUF file -> the name Hugging Face gives the same architecture.
GGUF_NAMES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma3": "Gemma3ForCausalLM",
    "gptj": "GPTJForCausalLM",
}


def register_model(name: str, cls: type[Any] | str, *, override: bool = False) -> None:
    """Serve checkpoints whose `architectures[0]` is `name` with `cls` (a class or "module:Class").

    Raises ConfigError where the name is taken, unless `override`.
    """
    ARCHITECTURES.register(name, cls, override=override)


def architecture_of(checkpoint: Checkpoint) -> str:
    """Return the name of the checkpoint's architecture; CheckpointError, with the valid names, if unknown."""
    if checkpoint.format == "gguf":
        given = require(checkpoint.config, "general.architecture", str, where="GGUF metadata")
        name, valid = GGUF_NAMES.get(given, given), [*GGUF_NAMES, *ARCHITECTURES]
    else:
        names = require(checkpoint.config, "architectures", list, minimum=1)
        given = name = names[0]
        valid = ARCHITECTURES.names()
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise CheckpointError(
            f"{checkpoint.path}: model architecture {given!r} is not supported; supported: "
            f"{', '.join(valid)}.{nearest(str(given), valid)} Add a class of your own with register_model()."
        )
    return name


def model_class(checkpoint: Checkpoint) -> Any:
    """Return the class that serves `checkpoint`."""
    return ARCHITECTURES.get(architecture_of(checkpoint))


def read_config(cls: Any, checkpoint: Checkpoint) -> Any:
    """Return `cls.Config` read from the checkpoint, whichever its format."""
    if checkpoint.format == "gguf":
        return cls.Config.from_gguf(checkpoint.config, checkpoint.tensor_names())
    return cls.Config.from_hf(checkpoint.config)
