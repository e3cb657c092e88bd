"""How does Gemma 3's text decoder run? Sandwich norms, norms of q and k, five local layers to a global.

Local layers see a window and turn by their own rotary base; the embedding is scaled by sqrt(hidden) and is
the head too. T tokens, R sampled rows, D hidden, V vocabulary.
Invariant: norm weights are held as what is applied, 1 + w: added when reading safetensors, so stored in GGUF.
Source: Gemma 3 Technical Report, arXiv 2503.19786.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from slipstream.checkpoint.base import Format
from slipstream.checkpoint.fields import optional, require
from slipstream.core.batch import ForwardBatch
from slipstream.core.cache_group import CacheGroup
from slipstream.core.errors import CheckpointError
from slipstream.layers.build_context import BuildContext
from slipstream.layers.decoder_block import BlockSpec, DecoderBlock
from slipstream.layers.embedding import LMHead, VocabEmbedding
from slipstream.layers.linear import local_kv_heads
from slipstream.layers.norm import RMSNorm
from slipstream.layers.rope_config import RopeConfig, rope_from_gguf, rope_from_hf
from slipstream.layers.rotary import Rotary
from slipstream.models.base import run_layers
from slipstream.models.config_fields import (
    GGUF,
    MAX_LAYERS,
    MAX_POSITIONS,
    gguf_sizes,
    hf_activation,
    hf_sizes,
)
from slipstream.models.weight_map import ADD_ONE, ATTENTION_ROWS, MLP_ROWS, Place, Row, block_places, ignore
from slipstream.parallel.mesh import Mesh
from slipstream.quant.base import QuantMethod

GLOBAL_THETA, LOCAL_THETA = 1_000_000.0, 10_000.0
DEFAULT_PATTERN = 6
LOCAL, GLOBAL = "sliding_attention", "full_attention"
# The 27B model alone scales its scores by the hidden size per head; GGUF has no key for it.
LAYERS_OF_27B = 62
HF_NAMES = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")
GGUF_NAMES = ("token_embd.weight", "output_norm.weight", "output.weight")
NORM_ROWS = (
    Row("input_layernorm", "attn_norm", "input_norm"),
    Row("post_attention_layernorm", "post_attention_norm", "post_attention_norm"),
    Row("pre_feedforward_layernorm", "ffn_norm", "mlp_norm"),
    Row("post_feedforward_layernorm", "post_ffw_norm", "post_mlp_norm"),
    Row("self_attn.q_norm", "attn_q_norm", "attention.q_norm"),
    Row("self_attn.k_norm", "attn_k_norm", "attention.k_norm"),
)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Gemma3Config:
    """Sizes of a Gemma 3 text model; `is_local[i]` says that layer i sees only `window` positions."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    norm_eps: float
    attention_scale: float
    window: int
    is_local: tuple[bool, ...]
    global_rope: RopeConfig
    local_rope: RopeConfig
    activation: str = "gelu_pytorch_tanh"
    final_softcap: float = 0.0
    is_tied: bool = True
    has_attention_bias: bool = False

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Gemma3Config:
        """Read a `config.json`. Raises CheckpointError naming the field that is missing or wrong."""
        _refuse_variants(config)
        sizes = hf_sizes(config)
        scalar = require(config, "query_pre_attn_scalar", float, minimum=1e-3, maximum=1e6)
        positions = sizes["max_position_embeddings"]
        return cls(
            **sizes,
            attention_scale=scalar**-0.5,
            window=require(config, "sliding_window", int, minimum=1, maximum=MAX_POSITIONS),
            is_local=_hf_pattern(config, sizes["num_layers"]),
            global_rope=rope_from_hf(
                config, max_positions=positions, default_theta=GLOBAL_THETA, layer_type=GLOBAL
            ),
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
            has_attention_bias=optional(config, "attention_bias", bool, False),
        )

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any], tensor_names: Iterable[str] = ()) -> Gemma3Config:
        """Read GGUF metadata, which has no keys for the local rotary base and the pattern of layers."""
        sizes = gguf_sizes(metadata, "gemma3")
        hidden, heads, head_dim = sizes["hidden_size"], sizes["num_heads"], sizes["head_dim"]
        per_head = hidden / heads if sizes["num_layers"] == LAYERS_OF_27B else head_dim
        return cls(
            **sizes,
            attention_scale=per_head**-0.5,
            window=require(
                metadata, "gemma3.attention.sliding_window", int, minimum=1, maximum=MAX_POSITIONS, where=GGUF
            ),
            is_local=_pattern(DEFAULT_PATTERN, sizes["num_layers"]),
            global_rope=rope_from_gguf(metadata, "gemma3", head_dim=head_dim, default_theta=GLOBAL_THETA),
            local_rope=RopeConfig(theta=LOCAL_THETA),
            final_softcap=optional(
                metadata, "gemma3.final_logit_softcapping", float, 0.0, minimum=1e-3, maximum=1e6, where=GGUF
            ),
            is_tied="output.weight" not in set(tensor_names),
        )

    def block_spec(self, layer_idx: int) -> BlockSpec:
        return BlockSpec(
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            norm_eps=self.norm_eps,
            attention_scale=self.attention_scale,
            activation=self.activation,
            window=self.window if self.is_local[layer_idx] else 0,
            has_qkv_bias=self.has_attention_bias,
            has_output_bias=self.has_attention_bias,
            has_qk_norms=True,
            has_post_norms=True,
        )


class Gemma3(nn.Module):
    """A decoder of sandwich-norm blocks, local and global."""

    Config = Gemma3Config

    def __init__(
        self,
        config: Gemma3Config,
        *,
        mesh: Mesh,
        quant: QuantMethod,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        super().__init__()
        self.config = config
        build = BuildContext(mesh=mesh, quant=quant, dtype=dtype, device=device)
        self.kv_heads = local_kv_heads(config.num_kv_heads, mesh.tp_size)
        # Rounded to the model's type, as the model was trained.
        scale = float(torch.tensor(config.hidden_size**0.5).to(dtype))
        self.embedding = VocabEmbedding(build, config.vocab_size, config.hidden_size, scale=scale)
        self.global_rotary = Rotary(build, config.global_rope, head_dim=config.head_dim)
        self.local_rotary = Rotary(build, config.local_rope, head_dim=config.head_dim)
        self.layers = nn.ModuleList(
            DecoderBlock(
                build,
                config.block_spec(i),
                layer_idx=i,
                rotary=self.local_rotary if is_local else self.global_rotary,
            )
            for i, is_local in enumerate(config.is_local)
        )
        self.norm = RMSNorm(build, config.hidden_size, config.norm_eps)
        tied = self.embedding if config.is_tied else None
        self.head = LMHead(build, config.vocab_size, config.hidden_size, tied=tied)

    def cache_groups(self) -> list[CacheGroup]:
        """Return the local layers as one "window" group and the global ones as one "full" group."""
        config = self.config
        local = tuple(i for i, is_local in enumerate(config.is_local) if is_local)
        rest = tuple(i for i, is_local in enumerate(config.is_local) if not is_local)
        sizes = {"heads": self.kv_heads, "head_dim": config.head_dim}
        groups: list[CacheGroup] = []
        if local:
            groups.append(CacheGroup(layers=local, kind="window", window=config.window, **sizes))
        if rest:
            groups.append(CacheGroup(layers=rest, kind="full", **sizes))
        return groups

    def forward(self, batch: ForwardBatch) -> Tensor:
        """Return the [T, D] hidden states after the final norm."""
        return self.norm(run_layers(self.layers, self.embedding(batch), batch))

    def logits(self, hidden_RD: Tensor) -> Tensor:
        """Return [R, V] float32."""
        logits_RV = self.head(hidden_RD)
        cap = self.config.final_softcap
        return logits_RV.div_(cap).tanh_().mul_(cap) if cap else logits_RV

    def weight_map(self, format: Format) -> dict[str, Place]:
        names, prefix = (HF_NAMES, "model.layers.") if format == "hf" else (GGUF_NAMES, "blk.")
        is_hf = format == "hf"
        places = {
            names[0]: Place(self.embedding.weight),
            names[1]: Place(self.norm.weight, transform=ADD_ONE if is_hf else None),
        }
        if not self.config.is_tied:
            places[names[2]] = Place(self.head.weight)
        elif is_hf:
            places[names[2]] = ignore("tied to the embedding")
        rows = ATTENTION_ROWS + MLP_ROWS + NORM_ROWS
        transforms = {row.hf: ADD_ONE for row in NORM_ROWS} if is_hf else {}
        for i, block in enumerate(self.layers):
            places |= block_places(block, f"{prefix}{i}.", rows, format, transforms)
        return places


def _pattern(period: int, num_layers: int) -> tuple[bool, ...]:
    return tuple((i + 1) % period != 0 for i in range(num_layers))


def _hf_pattern(config: Mapping[str, Any], num_layers: int) -> tuple[bool, ...]:
    """Read `layer_types`, or the period in `sliding_window_pattern` of older files."""
    if config.get("layer_types") is None:
        key = "sliding_window_pattern"
        return _pattern(
            optional(config, key, int, DEFAULT_PATTERN, minimum=1, maximum=MAX_LAYERS), num_layers
        )
    types = require(config, "layer_types", list, minimum=num_layers, maximum=num_layers)
    unknown = [kind for kind in types if kind not in (LOCAL, GLOBAL)]
    if unknown:
        raise CheckpointError(
            f"config.json: field 'layer_types' holds {unknown[0]!r}; allowed: {LOCAL!r}, {GLOBAL!r}."
        )
    return tuple(kind == LOCAL for kind in types)


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
