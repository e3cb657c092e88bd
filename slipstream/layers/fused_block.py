"""How does a decoder block run for one token on a GPU? In six kernels: each product takes its neighbours along.

norm + q, k, v; rotary + cache write; attention; output + residual; norm + gate, up + activation; down +
residual. With more tokens the products belong to the matrix units and each part runs by itself.
Invariant: `DecoderBlock` composed of its layers is the reference; what has an adapter, a shard, packed weights
or norms behind its parts is not fused.
T tokens, D hidden size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from slipstream.core.batch import ForwardBatch
from slipstream.kernels.fused_linear import GATED, fused_linear_op
from slipstream.layers.linear import Linear

if TYPE_CHECKING:
    from slipstream.layers.decoder_block import DecoderBlock


def can_fuse(block: DecoderBlock) -> bool:
    """Say whether a block's parts allow it, whatever the step."""
    linears: list[Linear] = [
        block.attention.qkv,
        block.attention.output,
        block.mlp.gate_up,
        block.mlp.down,
    ]
    is_plain = all(one.quant.capability.plain_weights and one.mesh.tp_size == 1 for one in linears)
    return is_plain and not block.spec.has_post_norms and block.spec.activation in GATED


def runs_fused(block: DecoderBlock, x_TD: Tensor, batch: ForwardBatch) -> bool:
    """Say whether this step runs fused: one token, on a GPU whose backend takes the projection as it is."""
    is_one_token = len(x_TD) == 1 and x_TD.is_cuda
    return is_one_token and block.is_fusible and batch.attention_plan.backend.capability.rotates


def run_fused(block: DecoderBlock, x_TD: Tensor, batch: ForwardBatch) -> Tensor:
    """Return the block's output for one token; writes K and V to the cache."""
    attention, mlp, norm = block.attention, block.mlp, block.input_norm
    qkv = attention.qkv
    qkv_TC = fused_linear_op(x_TD, qkv.weight, norm.weight, norm.eps, qkv.bias, "", None)
    attended_TC = attention.attend(qkv_TC, batch)
    output = attention.output
    x_TD = fused_linear_op(attended_TC, output.weight, None, 0.0, output.bias, "", x_TD)
    gate_up, norm = mlp.gate_up, block.mlp_norm
    activation = block.spec.activation
    mixed_TF = fused_linear_op(x_TD, gate_up.weight, norm.weight, norm.eps, gate_up.bias, activation, None)
    return fused_linear_op(mixed_TF, mlp.down.weight, None, 0.0, mlp.down.bias, "", x_TD)
