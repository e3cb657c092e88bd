"""How does a decoder block run on a GPU in few kernels? Each product takes its neighbours along.

One token: norm + q, k, v; rotary + cache write; attention; output + residual; norm + gate, up + activation;
down + residual. Several: a product that ends in a sum prepares the norm behind it, also across blocks: what
the last product of one block prepared waits in the step's plan for the first of the next.
Invariant: the block composed of its layers is the reference; what has a shard, packed weights or norms behind
its parts is not fused, nor are several tokens in float32, whose products the library computes exactly.
T tokens, D hidden size.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from slipstream.core.batch import ForwardBatch
from slipstream.kernels.fused_linear import GATED, fused_linear_op
from slipstream.kernels.plugins import KERNELS
from slipstream.kernels.rms_norm import rms_norm_op
from slipstream.kernels.scaled_linear import linear_then_norm_op, scaled_linear_op
from slipstream.layers.block_parts import BlockParts
from slipstream.layers.mlp import GatedMLP
from slipstream.layers.norm import RMSNorm

PREPARED = "prepared for the next block"
HALVES = (torch.bfloat16, torch.float16)
# What the products of several tokens take along, unless an outside kernel is to do it.
SMALL_OPS = frozenset({"rms_norm", "add_rms_norm", "silu_and_mul", "gelu_and_mul"})


def is_fusible(parts: BlockParts) -> bool:
    """Say whether a block's parts allow it, whatever the step."""
    mlp = parts.mlp
    if parts.mlp_norm is None or parts.post_attention_norm is not None or parts.post_mlp_norm is not None:
        return False
    if not isinstance(parts.input_norm, RMSNorm):
        return False
    is_plain = all(one.quant.capability.plain_weights and one.mesh.tp_size == 1 for one in parts.linears())
    return is_plain and isinstance(mlp, GatedMLP) and mlp.activation_name in GATED


def link(blocks: Iterable[Any]) -> None:
    """Tell each fusible block which norm the next one begins with."""
    for block, following in itertools.pairwise(blocks):
        if getattr(block, "fusible", None) is not None and getattr(following, "fusible", None) is not None:
            # In a tuple, so that the norm stays a module of its own block alone.
            block.next_norm = (following.input_norm,)


def suits(x_TD: Tensor, batch: ForwardBatch) -> bool:
    """Say whether a step runs fused: on a GPU whose attention takes the projection as it is."""
    if not x_TD.is_cuda or not batch.attention_plan.backend.capability.rotates:
        return False
    return len(x_TD) == 1 or (x_TD.dtype in HALVES and SMALL_OPS.isdisjoint(KERNELS.on_gpu))


def run_fused(
    parts: BlockParts, x_TD: Tensor, batch: ForwardBatch, next_norm: tuple[RMSNorm, ...] = ()
) -> Tensor:
    """Return the block's output; writes K and V to the cache."""
    if len(x_TD) > 1:
        return _run_several(parts, x_TD, batch, next_norm)
    attention, mlp, norm = parts.attention, parts.mlp, parts.input_norm
    assert isinstance(mlp, GatedMLP) and parts.mlp_norm is not None
    qkv, output = attention.qkv, attention.output
    qkv_TC = fused_linear_op(x_TD, qkv.weight, norm.weight, norm.eps, qkv.bias, "", None)
    attended_TC = attention.attend(qkv_TC, batch)
    x_TD = fused_linear_op(attended_TC, output.weight, None, 0.0, output.bias, "", x_TD)
    gate_up, norm, act = mlp.gate_up, parts.mlp_norm, mlp.activation_name
    mixed_TF = fused_linear_op(x_TD, gate_up.weight, norm.weight, norm.eps, gate_up.bias, act, None)
    return fused_linear_op(mixed_TF, mlp.down.weight, None, 0.0, mlp.down.bias, "", x_TD)


def _run_several(
    parts: BlockParts, x_TD: Tensor, batch: ForwardBatch, next_norm: tuple[RMSNorm, ...]
) -> Tensor:
    attention, mlp, norm = parts.attention, parts.mlp, parts.mlp_norm
    assert isinstance(mlp, GatedMLP) and norm is not None
    qkv, output, gate_up, down = attention.qkv, attention.output, mlp.gate_up, mlp.down
    ready_TD, squares_LT = _prepared(parts, x_TD, batch)
    eps = parts.input_norm.eps
    qkv_TC = scaled_linear_op(ready_TD, squares_LT, eps, qkv.weight, qkv.bias, "", None, qkv.counters)
    attended_TC = attention.attend(qkv_TC, batch)
    x_TD, ready_TD, squares_LT = linear_then_norm_op(
        attended_TC, output.weight, output.bias, x_TD, norm.weight, norm.eps, output.counters
    )
    act = mlp.activation_name
    mixed_TF = scaled_linear_op(
        ready_TD, squares_LT, norm.eps, gate_up.weight, gate_up.bias, act, None, gate_up.counters
    )
    if not next_norm:
        nothing = squares_LT[:0]
        return scaled_linear_op(mixed_TF, nothing, 0.0, down.weight, down.bias, "", x_TD, down.counters)
    norm = next_norm[0]
    x_TD, ready_TD, squares_LT = linear_then_norm_op(
        mixed_TF, down.weight, down.bias, x_TD, norm.weight, norm.eps, down.counters
    )
    batch.attention_plan.step_cache[PREPARED] = (x_TD, ready_TD, squares_LT)
    return x_TD


def _prepared(parts: BlockParts, x_TD: Tensor, batch: ForwardBatch) -> tuple[Tensor, Tensor]:
    """Return what the first product takes, and its squares; computed here where no block prepared it."""
    found = batch.attention_plan.step_cache.pop(PREPARED, None)
    if found is not None and found[0] is x_TD:
        return found[1], found[2]
    norm = parts.input_norm
    none_LT = torch.empty(0, len(x_TD), dtype=torch.float32, device=x_TD.device)
    return rms_norm_op(x_TD, norm.weight, norm.eps), none_LT
