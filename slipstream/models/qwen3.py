"""How does Qwen3's dense decoder run? Llama's blocks with norms of q and k and a head size of its own.

Invariant: the head size is read, never derived: it is not hidden size over heads in most of these models.
Source: Qwen3 Technical Report, arXiv 2505.09388.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from slipstream.checkpoint.fields import optional, require
from slipstream.models.config_fields import GGUF, MAX_HEAD_DIM, gguf_decoder, hf_decoder
from slipstream.models.dense_decoder import DecoderConfig, DenseDecoder
from slipstream.models.qwen2 import qwen_window, refuse_gguf_window
from slipstream.models.weight_map import ATTENTION_ROWS, MLP_ROWS, PRE_NORM_ROWS, QK_NORM_ROWS


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Qwen3Config(DecoderConfig):
    """Sizes of a dense Qwen3 model."""

    has_qk_norms: bool = True

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Qwen3Config:
        """Read a `config.json`. Raises CheckpointError naming the field that is missing or wrong."""
        require(config, "head_dim", int, minimum=2, maximum=MAX_HEAD_DIM)
        fields = hf_decoder(config)
        has_attention_bias = optional(config, "attention_bias", bool, False)
        return cls(
            **fields,
            **qwen_window(config, fields["num_layers"]),
            has_qkv_bias=has_attention_bias,
            has_output_bias=has_attention_bias,
        )

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any], tensor_names: Iterable[str] = ()) -> Qwen3Config:
        """Read GGUF metadata, which knows no window."""
        key = "qwen3.attention.key_length"
        require(metadata, key, int, minimum=2, maximum=MAX_HEAD_DIM, where=GGUF)
        refuse_gguf_window(metadata, "qwen3")
        return cls(**gguf_decoder(metadata, "qwen3", tensor_names))


class Qwen3(DenseDecoder):
    """A decoder of standard blocks that normalise queries and keys."""

    Config = Qwen3Config
    rows = ATTENTION_ROWS + MLP_ROWS + PRE_NORM_ROWS + QK_NORM_ROWS
