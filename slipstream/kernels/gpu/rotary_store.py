# pyright: reportMissingImports=false, reportIndexIssue=false
"""How do q, k and v get from the projection to where attention reads them on a GPU? In one pass.

A program takes some heads of one token: it norms q and k where the model does, turns them by the token's
position, leaves q in a tensor of its own and k and v in their slot of the cache.
T tokens, A heads of q, k and v together, N query heads, K kv heads, H head size, P positions of the table.
Invariant: float32 from the projection to the one rounding at the end; a negative slot writes nothing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from slipstream.kernels.gpu.launching import launch_options, start_next, wait_for_previous

HEADS_AT_ONCE = 8


@triton.jit
def _turn_and_store(
    qkv_ptr, table_ptr, position_ptr, q_norm_ptr, k_norm_ptr, q_ptr, kv_ptr, slots_ptr, eps,
    qkv_stride, page_stride, v_offset, token_stride, head_stride,
    N: tl.constexpr, K: tl.constexpr, HEAD: tl.constexpr, PAGE: tl.constexpr, BLOCK_A: tl.constexpr,
    BLOCK_H: tl.constexpr, HAS_NORMS: tl.constexpr, IS_INTERLEAVED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    a = tl.program_id(1) * BLOCK_A + tl.arange(0, BLOCK_A)
    h = tl.arange(0, BLOCK_H)
    if IS_INTERLEAVED:
        other = h ^ 1
    else:
        other = tl.where(h < HEAD // 2, h + HEAD // 2, h - HEAD // 2)
    start_next(PDL)
    wait_for_previous(PDL)
    mask = (a < N + 2 * K)[:, None] & (h < HEAD)[None, :]
    line = qkv_ptr + token * qkv_stride + a[:, None] * HEAD
    x = tl.load(line + h[None, :], mask=mask, other=0.0).to(tl.float32)
    pair = tl.load(line + other[None, :], mask=mask, other=0.0).to(tl.float32)
    position = tl.load(position_ptr + token).to(tl.int64)
    cos = tl.load(table_ptr + position * 2 * HEAD + h, mask=h < HEAD, other=0.0)[None, :]
    sin = tl.load(table_ptr + (position * 2 + 1) * HEAD + h, mask=h < HEAD, other=0.0)[None, :]
    is_turned = (a < N + K)[:, None]
    turned, partner = x, pair
    if HAS_NORMS:
        scale = tl.rsqrt(tl.sum(x * x, 1) / HEAD + eps)[:, None]
        q_own = tl.load(q_norm_ptr + h, mask=h < HEAD, other=0.0)[None, :]
        k_own = tl.load(k_norm_ptr + h, mask=h < HEAD, other=0.0)[None, :]
        q_pair = tl.load(q_norm_ptr + other, mask=h < HEAD, other=0.0)[None, :]
        k_pair = tl.load(k_norm_ptr + other, mask=h < HEAD, other=0.0)[None, :]
        is_q = (a < N)[:, None]
        turned = x * scale * tl.where(is_q, q_own, k_own)
        partner = pair * scale * tl.where(is_q, q_pair, k_pair)
    x = tl.where(is_turned, turned * cos + partner * sin, x)
    q_place = q_ptr + (token * N + a[:, None]) * HEAD + h[None, :]
    tl.store(q_place, x.to(q_ptr.dtype.element_ty), mask=mask & (a < N)[:, None])
    slot = tl.load(slots_ptr + token).to(tl.int64)
    place = kv_ptr + slot // PAGE * page_stride + slot % PAGE * token_stride
    is_v = a >= N + K
    head = tl.where(is_v, a - N - K, a - N).to(tl.int64)
    kv_place = place + tl.where(is_v, v_offset, 0)[:, None] + head[:, None] * head_stride + h[None, :]
    is_kept = (tl.where(a >= N, slot, -1) >= 0)[:, None]
    tl.store(kv_place, x.to(kv_ptr.dtype.element_ty), mask=mask & is_kept)


def rotary_store(
    qkv_TC: Tensor,
    table_P2H: Tensor,
    positions_T: Tensor,
    q_norm_H: Tensor | None,
    k_norm_H: Tensor | None,
    eps: float,
    interleaved: bool,
    heads: int,
    kv_P2tKH: Tensor,
    slots_T: Tensor,
) -> Tensor:
    """Return q [T, N, H] and write k and v; see `kernels/rotary_store.py`. Only enqueues."""
    tokens = len(qkv_TC)
    _, _, page_tokens, kv_heads, size = kv_P2tKH.shape
    q_TNH = torch.empty(tokens, heads, size, dtype=qkv_TC.dtype, device=qkv_TC.device)
    if tokens == 0:
        return q_TNH
    norms = (table_P2H, table_P2H) if q_norm_H is None or k_norm_H is None else (q_norm_H, k_norm_H)
    block_a = min(HEADS_AT_ONCE, triton.next_power_of_2(heads + 2 * kv_heads))
    _turn_and_store[(tokens, triton.cdiv(heads + 2 * kv_heads, block_a))](
        qkv_TC, table_P2H, positions_T, *norms, q_TNH, kv_P2tKH, slots_T, eps,
        qkv_TC.stride(0), kv_P2tKH.stride(0), kv_P2tKH.stride(1), kv_P2tKH.stride(2), kv_P2tKH.stride(3),
        N=heads, K=kv_heads, HEAD=size, PAGE=page_tokens, BLOCK_A=block_a,
        BLOCK_H=triton.next_power_of_2(size), HAS_NORMS=q_norm_H is not None, IS_INTERLEAVED=interleaved,
        num_warps=4, **launch_options(qkv_TC),
    )  # fmt: skip
    return q_TNH
