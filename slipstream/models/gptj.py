"""How does GPT-J run? Attention and a plain MLP side by side behind one LayerNorm; a part of the head turns.

T tokens, D hidden. Invariant: rotary pairs lie side by side, as in the checkpoint; no row is moved. The head
has a bias and is never tied.
Sources: Wang and Komatsuzaki, GPT-J-6B (2021), the mesh-transformer-jax repository; Su et al., RoFormer,
arXiv 2104.09864.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from slipstream.checkpoint.base import Format
from slipstream.checkpoint.fields import optional, require
from slipstream.core.batch import ForwardBatch
from slipstream.core.errors import CheckpointError
from slipstream.layers.attention import SelfAttention
from slipstream.layers.block_parts import BlockParts
from slipstream.layers.build_context import BuildContext
from slipstream.layers.mlp import MLP, PLAIN_ACTIVATIONS
from slipstream.layers.native_block import NativeBlock
from slipstream.layers.norm import LayerNorm
from slipstream.layers.rope_config import RopeConfig, rope_from_gguf
from slipstream.layers.rotary import Rotary
from slipstream.models.config_fields import (
    DEFAULT_THETA,
    MAX_HEADS,
    MAX_HIDDEN,
    MAX_INTERMEDIATE,
    MAX_LAYERS,
    MAX_POSITIONS,
    MAX_VOCAB,
    MIN_EPS,
    check_divides,
    check_heads,
    gguf_sizes,
    hf_activation,
    refuse_quantized,
)
from slipstream.models.dense_decoder import DecoderConfig, DenseDecoder, OuterNames
from slipstream.models.weight_map import Row

ROWS = (
    Row("attn.q_proj", "attn_q", "attention.qkv", "q"),
    Row("attn.k_proj", "attn_k", "attention.qkv", "k"),
    Row("attn.v_proj", "attn_v", "attention.qkv", "v"),
    Row("attn.out_proj", "attn_output", "attention.output"),
    Row("mlp.fc_in", "ffn_up", "mlp.up"),
    Row("mlp.fc_out", "ffn_down", "mlp.down"),
    Row("ln_1", "attn_norm", "norm"),
)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class GPTJConfig(DecoderConfig):
    """Sizes of a GPT-J model."""

    activation: str = "gelu_new"
    has_mlp_bias: bool = True
    has_head_bias: bool = True

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> GPTJConfig:
        """Read a `config.json`. Raises CheckpointError naming the field that is missing or wrong."""
        sizes = _hf_sizes(config)
        head_dim = sizes["head_dim"]
        rotary_dim = require(config, "rotary_dim", int, minimum=2, maximum=head_dim)
        if rotary_dim % 2:
            raise CheckpointError(
                f"config.json: field 'rotary_dim' is {rotary_dim}; rotary pairs need an even number."
            )
        if optional(config, "tie_word_embeddings", bool, False):
            raise CheckpointError(
                "config.json: field 'tie_word_embeddings' is true; the head of GPT-J has weights of its own."
            )
        return cls(
            **sizes,
            rope=RopeConfig(theta=DEFAULT_THETA, rotary_dim=0 if rotary_dim == head_dim else rotary_dim),
            activation=hf_activation(config, "activation_function", PLAIN_ACTIVATIONS),
        )

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any], tensor_names: Iterable[str] = ()) -> GPTJConfig:
        """Read GGUF metadata, which has no key for the activation."""
        sizes = gguf_sizes(metadata, "gptj", eps_key="attention.layer_norm_epsilon")
        rope = rope_from_gguf(
            metadata,
            "gptj",
            head_dim=sizes["head_dim"],
            max_positions=sizes["max_position_embeddings"],
            default_theta=DEFAULT_THETA,
            is_partial=True,
        )
        return cls(**sizes, rope=rope)


class ParallelBlock(NativeBlock):
    """x + attention(norm(x)) + mlp(norm(x))."""

    def __init__(self, build: BuildContext, config: GPTJConfig, *, layer_idx: int, rotary: Rotary) -> None:
        super().__init__()
        self.norm = LayerNorm(build, config.hidden_size, config.norm_eps)
        self.attention = SelfAttention.create(
            build,
            config.hidden_size,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            layer_idx=layer_idx,
            rotary_embedding=rotary,
        )
        self.mlp = MLP(
            build,
            config.hidden_size,
            config.intermediate_size,
            activation=config.activation,
            bias=config.has_mlp_bias,
        )

    def parts(self) -> BlockParts:
        return BlockParts(attention=self.attention, mlp=self.mlp, input_norm=self.norm)

    def forward(self, x_TD: Tensor, batch: ForwardBatch) -> Tensor:
        normed_TD = self.norm(x_TD)
        return x_TD + self.attention(normed_TD, batch) + self.mlp(normed_TD)


class GPTJ(DenseDecoder):
    """A decoder of parallel blocks."""

    Config = GPTJConfig
    rows = ROWS
    outer_names: ClassVar[dict[Format, OuterNames]] = {
        "hf": OuterNames("transformer.wte", "transformer.ln_f", "lm_head", "transformer.h."),
        "gguf": DenseDecoder.outer_names["gguf"],
    }
    buffers_of_hf = ()
    # The causal mask and its filler, which older files hold.
    layer_buffers_of_hf = ("attn.bias", "attn.masked_bias", "attn.embed_positions")

    def make_rotary(self, build: BuildContext, rope: RopeConfig) -> Rotary:
        return Rotary(build, rope, head_dim=self.config.head_dim, interleaved=True)

    def make_layer(self, build: BuildContext, layer_idx: int) -> nn.Module:
        return ParallelBlock(build, self.config, layer_idx=layer_idx, rotary=self.rotary)

    def make_norm(self, build: BuildContext) -> nn.Module:
        return LayerNorm(build, self.config.hidden_size, self.config.norm_eps)


def _hf_sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    """Read the sizes under GPT-J's names, by the names of our record."""
    refuse_quantized(config)

    def number(key: str, maximum: int) -> int:
        return require(config, key, int, minimum=1, maximum=maximum)

    hidden, heads = number("n_embd", MAX_HIDDEN), number("n_head", MAX_HEADS)
    check_divides(hidden, "n_embd", heads, "n_head")
    sizes = {
        "vocab_size": number("vocab_size", MAX_VOCAB),
        "hidden_size": hidden,
        "intermediate_size": optional(
            config, "n_inner", int, 4 * hidden, minimum=1, maximum=MAX_INTERMEDIATE
        ),
        "num_layers": number("n_layer", MAX_LAYERS),
        "num_heads": heads,
        "num_kv_heads": heads,
        "head_dim": hidden // heads,
        "max_position_embeddings": number("n_positions", MAX_POSITIONS),
        "norm_eps": require(config, "layer_norm_epsilon", float, minimum=MIN_EPS, maximum=1.0),
    }
    check_heads(sizes, "n_head", "n_head", "n_embd / n_head")
    return sizes
