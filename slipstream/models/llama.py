"""How does the Llama family run? Pre-norm blocks, grouped queries, rotary positions, SwiGLU.

Serves Llama 2 and 3, SmolLM2 and what shares their architecture name.
T tokens, R sampled rows, D hidden, V vocabulary.
Invariant: `LlamaConfig` is complete and checked before a tensor is allocated.
Sources: Touvron et al., arXiv 2307.09288; The Llama 3 Herd of Models, arXiv 2407.21783.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from slipstream.checkpoint.base import Format
from slipstream.checkpoint.fields import optional
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
from slipstream.models.config_fields import GGUF, gguf_sizes, hf_activation, hf_sizes
from slipstream.models.weight_map import (
    ATTENTION_ROWS,
    MLP_ROWS,
    Place,
    Row,
    block_places,
    ignore,
    split_pairs,
)
from slipstream.parallel.mesh import Mesh
from slipstream.quant.base import QuantMethod

DEFAULT_THETA = 10_000.0
NORM_ROWS = (
    Row("input_layernorm", "attn_norm", "input_norm"),
    Row("post_attention_layernorm", "ffn_norm", "mlp_norm"),
)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LlamaConfig:
    """Sizes of a Llama model; made by `from_hf` or `from_gguf`."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    norm_eps: float
    rope: RopeConfig
    activation: str = "silu"
    is_tied: bool = False
    has_attention_bias: bool = False
    has_mlp_bias: bool = False

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> LlamaConfig:
        """Read a `config.json`. Raises CheckpointError naming the field that is missing or wrong."""
        sizes = hf_sizes(config)
        return cls(
            **sizes,
            rope=rope_from_hf(
                config, max_positions=sizes["max_position_embeddings"], default_theta=DEFAULT_THETA
            ),
            activation=hf_activation(config, "hidden_act"),
            is_tied=optional(config, "tie_word_embeddings", bool, False),
            has_attention_bias=optional(config, "attention_bias", bool, False),
            has_mlp_bias=optional(config, "mlp_bias", bool, False),
        )

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any], tensor_names: Iterable[str] = ()) -> LlamaConfig:
        """Read GGUF metadata. The head is tied unless there is an `output.weight`."""
        names = set(tensor_names)
        experts = optional(metadata, "llama.expert_count", int, 0, where=GGUF)
        if experts:
            raise CheckpointError(
                f"{GGUF}: llama.expert_count is {experts}; mixtures of experts are not supported."
            )
        sizes = gguf_sizes(metadata, "llama")
        rope = rope_from_gguf(
            metadata,
            "llama",
            head_dim=sizes["head_dim"],
            default_theta=DEFAULT_THETA,
            has_factors="rope_freqs.weight" in names,
        )
        return cls(**sizes, rope=rope, is_tied="output.weight" not in names)

    def block_spec(self) -> BlockSpec:
        return BlockSpec(
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            norm_eps=self.norm_eps,
            attention_scale=self.head_dim**-0.5,
            activation=self.activation,
            has_qkv_bias=self.has_attention_bias,
            has_output_bias=self.has_attention_bias,
            has_mlp_bias=self.has_mlp_bias,
        )


class Llama(nn.Module):
    """A decoder of standard blocks with full attention."""

    Config = LlamaConfig

    def __init__(
        self,
        config: LlamaConfig,
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
        self.embedding = VocabEmbedding(build, config.vocab_size, config.hidden_size)
        self.rotary = Rotary(build, config.rope, head_dim=config.head_dim)
        spec = config.block_spec()
        self.layers = nn.ModuleList(
            DecoderBlock(build, spec, layer_idx=i, rotary=self.rotary) for i in range(config.num_layers)
        )
        self.norm = RMSNorm(build, config.hidden_size, config.norm_eps)
        tied = self.embedding if config.is_tied else None
        self.head = LMHead(build, config.vocab_size, config.hidden_size, tied=tied)

    def cache_groups(self) -> list[CacheGroup]:
        layers = tuple(range(self.config.num_layers))
        return [CacheGroup(layers=layers, kind="full", heads=self.kv_heads, head_dim=self.config.head_dim)]

    def forward(self, batch: ForwardBatch) -> Tensor:
        """Return the [T, D] hidden states after the final norm."""
        return self.norm(run_layers(self.layers, self.embedding(batch), batch))

    def logits(self, hidden_RD: Tensor) -> Tensor:
        """Return [R, V] float32."""
        return self.head(hidden_RD)

    def weight_map(self, format: Format) -> dict[str, Place]:
        return self._hf_map() if format == "hf" else self._gguf_map()

    def _hf_map(self) -> dict[str, Place]:
        places = {
            "model.embed_tokens.weight": Place(self.embedding.weight),
            "model.norm.weight": Place(self.norm.weight),
            "lm_head.weight": ignore("tied to the embedding")
            if self.config.is_tied
            else Place(self.head.weight),
            "model.rotary_emb.inv_freq": ignore("derived from the configuration"),
        }
        for i, block in enumerate(self.layers):
            prefix = f"model.layers.{i}."
            places |= block_places(block, prefix, ATTENTION_ROWS + MLP_ROWS + NORM_ROWS, "hf")
            places[f"{prefix}self_attn.rotary_emb.inv_freq"] = ignore("derived from the configuration")
        return places

    def _gguf_map(self) -> dict[str, Place]:
        places = {
            "token_embd.weight": Place(self.embedding.weight),
            "output_norm.weight": Place(self.norm.weight),
        }
        if not self.config.is_tied:
            places["output.weight"] = Place(self.head.weight)
        if self.rotary.factors is not None:
            places["rope_freqs.weight"] = Place(self.rotary.factors)
        pairs = split_pairs(self.config.head_dim)
        transforms = {"attn_q": pairs, "attn_k": pairs}
        for i, block in enumerate(self.layers):
            rows = ATTENTION_ROWS + MLP_ROWS + NORM_ROWS
            places |= block_places(block, f"blk.{i}.", rows, "gguf", transforms)
        return places
