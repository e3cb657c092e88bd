"""How does Qwen2 run, and Qwen2.5? Llama's blocks with biases on q, k and v; later layers may see a window.

Invariant: the window is read only where `use_sliding_window` is on, and then its layers must be told.
Source: Qwen2 Technical Report, arXiv 2407.10671.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from slipstream.checkpoint.fields import optional, require
from slipstream.core.errors import CheckpointError
from slipstream.models.config_fields import (
    GGUF,
    MAX_LAYERS,
    gguf_decoder,
    hf_decoder,
    hf_layer_types,
    hf_window,
)
from slipstream.models.dense_decoder import DecoderConfig, DenseDecoder


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Qwen2Config(DecoderConfig):
    """Sizes of a Qwen2 model."""

    has_qkv_bias: bool = True

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Qwen2Config:
        """Read a `config.json`. Raises CheckpointError naming the field that is missing or wrong."""
        fields = hf_decoder(config)
        return cls(**fields, **qwen_window(config, fields["num_layers"]))

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any], tensor_names: Iterable[str] = ()) -> Qwen2Config:
        """Read GGUF metadata, which knows no window."""
        refuse_gguf_window(metadata, "qwen2")
        return cls(**gguf_decoder(metadata, "qwen2", tensor_names))


class Qwen2(DenseDecoder):
    """A decoder of standard blocks with biased queries, keys and values."""

    Config = Qwen2Config


def qwen_window(config: Mapping[str, Any], num_layers: int) -> dict[str, Any]:
    """Return the window and its layers: those of `layer_types`, or all from `max_window_layers` on."""
    has_types = config.get("layer_types") is not None
    if not optional(config, "use_sliding_window", bool, False):
        if has_types and any(hf_layer_types(config, num_layers)):
            raise CheckpointError(
                "config.json: field 'layer_types' names sliding layers and 'use_sliding_window' is not true; "
                "set it, or make all layers 'full_attention'."
            )
        return {}
    if has_types:
        is_local = hf_layer_types(config, num_layers)
    else:
        first = require(config, "max_window_layers", int, minimum=0, maximum=MAX_LAYERS)
        is_local = tuple(i >= first for i in range(num_layers))
    return {"window": hf_window(config), "is_local": is_local}


def refuse_gguf_window(metadata: Mapping[str, Any], architecture: str) -> None:
    key = f"{architecture}.attention.sliding_window"
    if metadata.get(key) is not None:
        raise CheckpointError(
            f"{GGUF}: {key} is set, but not which layers it holds for; use the original folder (with "
            "config.json)."
        )
