"""How does Gemma 3's text decoder run? Sandwich norms, norms of q and k, five local layers to a global.

Local layers see a window and turn by their own rotary base; the embedding is scaled by sqrt(hidden) and is
the head too.
Invariant: norm weights are held as what is applied, 1 + w: added when reading safetensors, so stored in GGUF.
Source: Gemma 3 Technical Report, arXiv 2503.19786.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from slipstream.checkpoint.base import Format
from slipstream.checkpoint.fields import optional, require
from slipstream.core.errors import CheckpointError
from slipstream.layers.rope_config import RopeConfig, rope_from_gguf, rope_from_hf
from slipstream.models.config_fields import (
    GGUF,
    GLOBAL,
    LOCAL,
    MAX_LAYERS,
    MAX_POSITIONS,
    gguf_sizes,
    hf_activation,
    hf_layer_types,
    hf_sizes,
    hf_window,
    with_rope,
)
from slipstream.models.dense_decoder import DecoderConfig, DenseDecoder
from slipstream.models.weight_map import (
    ADD_ONE,
    ATTENTION_ROWS,
    MLP_ROWS,
    QK_NORM_ROWS,
    Row,
    RowTransform,
)

GLOBAL_THETA, LOCAL_THETA = 1_000_000.0, 10_000.0
DEFAULT_PATTERN = 6
# The 27B model alone scales its scores by the hidden size per head; GGUF has no key for it.
LAYERS_OF_27B = 62
NORM_ROWS = (
    Row("input_layernorm", "attn_norm", "input_norm"),
    Row("post_attention_layernorm", "post_attention_norm", "post_attention_norm"),
    Row("pre_feedforward_layernorm", "ffn_norm", "mlp_norm"),
    Row("post_feedforward_layernorm", "post_ffw_norm", "post_mlp_norm"),
    *QK_NORM_ROWS,
)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Gemma3Config(DecoderConfig):
    """Sizes of a Gemma 3 text model."""

    activation: str = "gelu_pytorch_tanh"
    is_tied: bool = True
    has_qk_norms: bool = True
    has_post_norms: bool = True

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Gemma3Config:
        """Read a `config.json`. Raises CheckpointError naming the field that is missing or wrong."""
        _refuse_variants(config)
        sizes = hf_sizes(config)
        has_attention_bias = optional(config, "attention_bias", bool, False)
        scalar = require(config, "query_pre_attn_scalar", float, minimum=1e-3, maximum=1e6)
        positions = sizes["max_position_embeddings"]
        rope = rope_from_hf(config, max_positions=positions, default_theta=GLOBAL_THETA, layer_type=GLOBAL)
        return cls(
            **with_rope(sizes, rope),
            attention_scale=scalar**-0.5,
            window=hf_window(config),
            is_local=_hf_pattern(config, sizes["num_layers"]),
            local_rope=rope_from_hf(
                config,
                max_positions=positions,
                default_theta=LOCAL_THETA,
                layer_type=LOCAL,
                theta_key="rope_local_base_freq",
                is_scaled=False,
            ),
            activation=hf_activation(config, "hidden_activation"),
            final_softcap=optional(config, "final_logit_softcapping", float, 0.0, minimum=1e-3, maximum=1e6),
            is_tied=optional(config, "tie_word_embeddings", bool, True),
            has_qkv_bias=has_attention_bias,
            has_output_bias=has_attention_bias,
        )

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any], tensor_names: Iterable[str] = ()) -> Gemma3Config:
        """Read GGUF metadata, which has no keys for the local rotary base and the pattern of layers."""
        sizes = gguf_sizes(metadata, "gemma3")
        hidden, heads, head_dim = sizes["hidden_size"], sizes["num_heads"], sizes["head_dim"]
        per_head = hidden / heads if sizes["num_layers"] == LAYERS_OF_27B else head_dim
        rope = rope_from_gguf(
            metadata,
            "gemma3",
            head_dim=head_dim,
            max_positions=sizes["max_position_embeddings"],
            default_theta=GLOBAL_THETA,
        )
        return cls(
            **with_rope(sizes, rope),
            attention_scale=per_head**-0.5,
            window=require(
                metadata, "gemma3.attention.sliding_window", int, minimum=1, maximum=MAX_POSITIONS, where=GGUF
            ),
            is_local=_pattern(DEFAULT_PATTERN, sizes["num_layers"]),
            local_rope=RopeConfig(theta=LOCAL_THETA),
            final_softcap=optional(
                metadata, "gemma3.final_logit_softcapping", float, 0.0, minimum=1e-3, maximum=1e6, where=GGUF
            ),
            is_tied="output.weight" not in set(tensor_names),
        )


class Gemma3(DenseDecoder):
    """A decoder of sandwich-norm blocks, local and global."""

    Config = Gemma3Config
    rows = ATTENTION_ROWS + MLP_ROWS + NORM_ROWS

    def embedding_scale(self, dtype: torch.dtype) -> float:
        # Rounded to the model's type, as the model was trained.
        return float(torch.tensor(self.config.hidden_size**0.5).to(dtype))

    def transforms(self, format: Format) -> dict[str, RowTransform]:
        if format == "gguf":
            return {}
        return dict.fromkeys([row.hf for row in NORM_ROWS] + [self.outer_names["hf"].norm], ADD_ONE)


def _pattern(period: int, num_layers: int) -> tuple[bool, ...]:
    return tuple((i + 1) % period != 0 for i in range(num_layers))


def _hf_pattern(config: Mapping[str, Any], num_layers: int) -> tuple[bool, ...]:
    """Read `layer_types`, or the period in `sliding_window_pattern` of older files."""
    if config.get("layer_types") is None:
        key = "sliding_window_pattern"
        return _pattern(
            optional(config, key, int, DEFAULT_PATTERN, minimum=1, maximum=MAX_LAYERS), num_layers
        )
    return hf_layer_types(config, num_layers)


def _refuse_variants(config: Mapping[str, Any]) -> None:
    if optional(config, "use_bidirectional_attention", bool, False):
        raise CheckpointError(
            "config.json: field 'use_bidirectional_attention' is true; this decoder is causal only."
        )
    if config.get("attn_logit_softcapping") is not None:
        raise CheckpointError(
            "config.json: field 'attn_logit_softcapping' is set; Gemma 3 has norms of q and k instead, and "
            "caps no scores. Remove the field, or use the checkpoint's own configuration."
        )
