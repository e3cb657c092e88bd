"""How does a decoder block run for one token on a GPU? Few kernels: each product takes its neighbours along.

norm + q, k, v; rotary + cache write; attention; output + residual; norm + gate, up + activation; down +
residual. With more tokens the products belong to the matrix units and each part runs by itself.
Invariant: the block composed of its layers is the reference; what has a shard, packed weights or norms behind
its parts is not fused.
T tokens, D hidden size.
"""

from __future__ import annotations

from torch import Tensor

from slipstream.core.batch import ForwardBatch
from slipstream.kernels.fused_linear import GATED, fused_linear_op
from slipstream.layers.block_parts import BlockParts
from slipstream.layers.mlp import GatedMLP


def is_fusible(parts: BlockParts) -> bool:
    """Say whether a block's parts allow it, whatever the step."""
    mlp = parts.mlp
    if parts.mlp_norm is None or parts.post_attention_norm is not None or parts.post_mlp_norm is not None:
        return False
    is_plain = all(one.quant.capability.plain_weights and one.mesh.tp_size == 1 for one in parts.linears())
    return is_plain and isinstance(mlp, GatedMLP) and mlp.activation_name in GATED


def suits(x_TD: Tensor, batch: ForwardBatch) -> bool:
    """Say whether a step runs fused: one token, on a GPU whose attention takes the projection as it is."""
    return len(x_TD) == 1 and x_TD.is_cuda and batch.attention_plan.backend.capability.rotates


def run_fused(parts: BlockParts, x_TD: Tensor, batch: ForwardBatch) -> Tensor:
    """Return the block's output for one token; writes K and V to the cache."""
    attention, mlp, norm = parts.attention, parts.mlp, parts.input_norm
    assert isinstance(mlp, GatedMLP) and parts.mlp_norm is not None
    qkv, output = attention.qkv, attention.output
    qkv_TC = fused_linear_op(x_TD, qkv.weight, norm.weight, norm.eps, qkv.bias, "", None)
    attended_TC = attention.attend(qkv_TC, batch)
    x_TD = fused_linear_op(attended_TC, output.weight, None, 0.0, output.bias, "", x_TD)
    gate_up, norm, act = mlp.gate_up, parts.mlp_norm, mlp.activation_name
    mixed_TF = fused_linear_op(x_TD, gate_up.weight, norm.weight, norm.eps, gate_up.bias, act, None)
    return fused_linear_op(mixed_TF, mlp.down.weight, None, 0.0, mlp.down.bias, "", x_TD)
