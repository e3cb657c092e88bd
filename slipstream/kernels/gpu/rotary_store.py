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

# Of one token, by one program of four warps: two loads of 16 bytes a thread on their way beside the table's.
HEADS_AT_ONCE = 16


@triton.jit
def _load_pairs(lines, mask, HEAD: tl.constexpr, BLOCK_H: tl.constexpr, IS_INTERLEAVED: tl.constexpr):
    """Return what turns together, two tensors [A, BLOCK_H / 2] in float32, of lines [A, 1]."""
    if IS_INTERLEAVED:
        h = tl.arange(0, BLOCK_H)[None, :]
        x = tl.load(lines + h, mask=mask & (h < HEAD), other=0.0).to(tl.float32)
        first, second = tl.split(tl.reshape(x, (x.shape[0], BLOCK_H // 2, 2)))
    else:
        h = tl.arange(0, BLOCK_H // 2)[None, :]
        inside = mask & (h < HEAD // 2)
        first = tl.load(lines + h, mask=inside, other=0.0).to(tl.float32)
        second = tl.load(lines + HEAD // 2 + h, mask=inside, other=0.0).to(tl.float32)
    return first, second


@triton.jit
def _store_pairs(
    lines, mask, first, second, HEAD: tl.constexpr, BLOCK_H: tl.constexpr, IS_INTERLEAVED: tl.constexpr
):  # fmt: skip
    """Write what `_load_pairs` returns."""
    kind = lines.dtype.element_ty
    if IS_INTERLEAVED:
        h = tl.arange(0, BLOCK_H)[None, :]
        x = tl.reshape(tl.join(first.to(kind), second.to(kind)), (first.shape[0], BLOCK_H))
        tl.store(lines + h, x, mask=mask & (h < HEAD))
    else:
        h = tl.arange(0, BLOCK_H // 2)[None, :]
        inside = mask & (h < HEAD // 2)
        tl.store(lines + h, first.to(kind), mask=inside)
        tl.store(lines + HEAD // 2 + h, second.to(kind), mask=inside)


@triton.jit(
    do_not_specialize_on_alignment=["position_ptr", "slots_ptr"],
)
def _turn_and_store(
    qkv_ptr, table_ptr, position_ptr, q_norm_ptr, k_norm_ptr, q_ptr, kv_ptr, slots_ptr, eps,
    qkv_stride, page_stride, v_offset, token_stride, head_stride,
    N: tl.constexpr, K: tl.constexpr, HEAD: tl.constexpr, PAGE: tl.constexpr, BLOCK_A: tl.constexpr,
    BLOCK_H: tl.constexpr, HAS_NORMS: tl.constexpr, IS_INTERLEAVED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    a = (tl.program_id(1) * BLOCK_A + tl.arange(0, BLOCK_A))[:, None]
    start_next(PDL)
    wait_for_previous(PDL)
    position = tl.load(position_ptr + token).to(tl.int64)
    slot = tl.load(slots_ptr + token).to(tl.int64)
    is_head, zero = a < N + 2 * K, tl.zeros((1, 1), tl.int32)
    line = qkv_ptr + token * qkv_stride + a * HEAD
    first, second = _load_pairs(line, is_head, HEAD, BLOCK_H, IS_INTERLEAVED)
    # One line of the table as [1, 1], so that it is read as lines of heads are.
    at = table_ptr + position * 2 * HEAD + zero
    cos_1, cos_2 = _load_pairs(at, zero == 0, HEAD, BLOCK_H, IS_INTERLEAVED)
    sin_1, sin_2 = _load_pairs(at + HEAD, zero == 0, HEAD, BLOCK_H, IS_INTERLEAVED)
    x, y = first, second
    if HAS_NORMS:
        scale = tl.rsqrt((tl.sum(x * x, 1) + tl.sum(y * y, 1)) / HEAD + eps)[:, None]
        q_1, q_2 = _load_pairs(q_norm_ptr + zero, zero == 0, HEAD, BLOCK_H, IS_INTERLEAVED)
        k_1, k_2 = _load_pairs(k_norm_ptr + zero, zero == 0, HEAD, BLOCK_H, IS_INTERLEAVED)
        x, y = x * scale * tl.where(a < N, q_1, k_1), y * scale * tl.where(a < N, q_2, k_2)
    turned_1, turned_2 = x * cos_1 + y * sin_1, y * cos_2 + x * sin_2
    first = tl.where(a < N + K, turned_1, first)
    second = tl.where(a < N + K, turned_2, second)
    q_line = q_ptr + (token * N + a) * HEAD
    _store_pairs(q_line, a < N, first, second, HEAD, BLOCK_H, IS_INTERLEAVED)
    head = tl.where(a >= N + K, a - N - K, a - N).to(tl.int64)
    place = kv_ptr + slot // PAGE * page_stride + slot % PAGE * token_stride + head * head_stride
    place += tl.where(a >= N + K, v_offset, 0)
    is_kept = tl.where(a >= N, slot, -1) >= 0
    _store_pairs(place, is_head & is_kept, first, second, HEAD, BLOCK_H, IS_INTERLEAVED)


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
