"""How does the Llama family run? Pre-norm blocks, grouped queries, rotary positions, SwiGLU.

Serves Llama 2 and 3, SmolLM2 and what shares their architecture name; GGUF files of Mistral share it too.
Invariant: GGUF keeps the rows of q and k with rotary pairs side by side; they are put back when read.
Sources: Touvron et al., arXiv 2307.09288; The Llama 3 Herd of Models, arXiv 2407.21783.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from slipstream.checkpoint.base import Format
from slipstream.checkpoint.fields import optional
from slipstream.models.config_fields import GGUF, MAX_POSITIONS, gguf_decoder, hf_decoder
from slipstream.models.dense_decoder import DecoderConfig, DenseDecoder
from slipstream.models.weight_map import RowTransform, split_pairs


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LlamaConfig(DecoderConfig):
    """Sizes of a Llama model; made by `from_hf` or `from_gguf`."""

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> LlamaConfig:
        """Read a `config.json`. Raises CheckpointError naming the field that is missing or wrong."""
        has_attention_bias = optional(config, "attention_bias", bool, False)
        return cls(
            **hf_decoder(config),
            has_qkv_bias=has_attention_bias,
            has_output_bias=has_attention_bias,
            has_mlp_bias=optional(config, "mlp_bias", bool, False),
        )

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any], tensor_names: Iterable[str] = ()) -> LlamaConfig:
        """Read GGUF metadata; a window there holds for every layer."""
        fields = gguf_decoder(metadata, "llama", tensor_names)
        key = "llama.attention.sliding_window"
        window = optional(metadata, key, int, 0, minimum=1, maximum=MAX_POSITIONS, where=GGUF)
        return cls(**fields, **every_layer_local(window, fields["num_layers"]))


class Llama(DenseDecoder):
    """A decoder of standard blocks."""

    Config = LlamaConfig

    def transforms(self, format: Format) -> dict[str, RowTransform]:
        if format == "hf":
            return {}
        pairs = split_pairs(self.config.head_dim)
        return {"attn_q": pairs, "attn_k": pairs}


def every_layer_local(window: int, num_layers: int) -> dict[str, Any]:
    """Return the fields of a `DecoderConfig` whose layers all see `window` positions (all, where it is 0)."""
    return {"window": window, "is_local": (True,) * num_layers} if window else {}
