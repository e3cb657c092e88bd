"""What is the standard transformer block? Attention and a gated MLP, each behind a norm and a residual.

Llama's block norms before each part; Gemma's norms after it too, before the residual add. Biases, norms of q
and k, a window and a soft cap are fields of `BlockSpec`, not subclasses.
Invariant: this composition is the reference of any fused block.
"""

from __future__ import annotations

import dataclasses

from torch import Tensor

from slipstream.attention.base import AttentionSpec
from slipstream.core.batch import ForwardBatch
from slipstream.layers.attention import SelfAttention
from slipstream.layers.block_parts import BlockParts
from slipstream.layers.build_context import BuildContext
from slipstream.layers.fused_block import is_fusible, run_fused, suits
from slipstream.layers.linear import QKVLinear, RowParallelLinear
from slipstream.layers.mlp import GatedMLP
from slipstream.layers.native_block import NativeBlock
from slipstream.layers.norm import RMSNorm
from slipstream.layers.rotary import Rotary


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class BlockSpec:
    """Sizes of the whole model, not of a rank. `window` and `softcap` are 0 where absent."""

    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    attention_scale: float
    activation: str = "silu"
    window: int = 0
    softcap: float = 0.0
    has_qkv_bias: bool = False
    has_output_bias: bool = False
    has_mlp_bias: bool = False
    has_qk_norms: bool = False
    has_post_norms: bool = False


class DecoderBlock(NativeBlock):
    """One layer of a decoder."""

    def __init__(self, build: BuildContext, spec: BlockSpec, *, layer_idx: int, rotary: Rotary) -> None:
        super().__init__()
        hidden, eps = spec.hidden_size, spec.norm_eps
        self.spec = spec
        self.input_norm = RMSNorm(build, hidden, eps)
        self.attention = _self_attention(build, spec, layer_idx, rotary)
        self.post_attention_norm = RMSNorm(build, hidden, eps) if spec.has_post_norms else None
        self.mlp_norm = RMSNorm(build, hidden, eps)
        self.mlp = GatedMLP(
            build,
            hidden,
            spec.intermediate_size,
            activation=spec.activation,
            bias=spec.has_mlp_bias,
        )
        self.post_mlp_norm = RMSNorm(build, hidden, eps) if spec.has_post_norms else None
        self.fusible = self.parts() if is_fusible(self.parts()) else None
        self.next_norm: tuple[RMSNorm, ...] = ()

    def parts(self) -> BlockParts:
        return BlockParts(
            attention=self.attention,
            mlp=self.mlp,
            input_norm=self.input_norm,
            mlp_norm=self.mlp_norm,
            post_attention_norm=self.post_attention_norm,
            post_mlp_norm=self.post_mlp_norm,
        )

    def forward(self, x_TD: Tensor, batch: ForwardBatch) -> Tensor:
        if self.fusible is not None and suits(x_TD, batch):
            return run_fused(self.fusible, x_TD, batch, self.next_norm)
        attended_TD = self.attention(self.input_norm(x_TD), batch)
        if self.post_attention_norm is not None:
            attended_TD = self.post_attention_norm(attended_TD)
        normed_TD, x_TD = self.mlp_norm.add(attended_TD, x_TD)
        if self.post_mlp_norm is not None:
            return x_TD + self.post_mlp_norm(self.mlp(normed_TD))
        return self.mlp.add(normed_TD, x_TD)


def _self_attention(build: BuildContext, spec: BlockSpec, layer_idx: int, rotary: Rotary) -> SelfAttention:
    qkv = QKVLinear(
        build,
        spec.hidden_size,
        num_heads=spec.num_heads,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        bias=spec.has_qkv_bias,
    )
    output = RowParallelLinear(
        build, spec.num_heads * spec.head_dim, spec.hidden_size, bias=spec.has_output_bias
    )
    attention_spec = AttentionSpec(
        layer_idx=layer_idx,
        scale=spec.attention_scale,
        num_kv_heads=qkv.num_kv_heads,
        head_dim=spec.head_dim,
        window=spec.window,
        softcap=spec.softcap,
    )
    norms = [RMSNorm(build, spec.head_dim, spec.norm_eps) if spec.has_qk_norms else None for _ in range(2)]
    return SelfAttention(
        qkv, output, spec=attention_spec, rotary_embedding=rotary, q_norm=norms[0], k_norm=norms[1]
    )
