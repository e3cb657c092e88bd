# pyright: reportMissingImports=false, reportIndexIssue=false
"""How does the one token of a step attend on a GPU, from its projection on? In one kernel.

A program takes one kv head and one share of the context, as in `paged_decode.py`, and turns the query heads
that use it itself. The program whose share ends with the token writes its k and v before it reads the share.
Invariant: bit by bit what `rotary_store.py` and `paged_decode.py` compute one after the other. Only for a
step of one row: with more, a row could read what another writes in the same step.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from slipstream.kernels.gpu.launching import launch_options, start_next, wait_for_previous
from slipstream.kernels.gpu.paged_decode import (
    LOG2_E,
    attend_share,
    bounds_of,
    finish_share,
    make_parts,
    shape_of,
)


@triton.jit
def _turned(
    line_ptr, norm_ptr, cos, sin, h, other, mask, is_h, eps, HEAD: tl.constexpr, HAS_NORMS: tl.constexpr
):  # fmt: skip
    """Return heads [A, H] of the projection at `line_ptr` [A, 1], normed and turned, in float32."""
    x = tl.load(line_ptr + h[None, :], mask=mask, other=0.0).to(tl.float32)
    pair = tl.load(line_ptr + other[None, :], mask=mask, other=0.0).to(tl.float32)
    if HAS_NORMS:
        scale = tl.rsqrt(tl.sum(x * x, 1) / HEAD + eps)[:, None]
        x = x * scale * tl.load(norm_ptr + h, mask=is_h, other=0.0)[None, :]
        pair = pair * scale * tl.load(norm_ptr + other, mask=is_h, other=0.0)[None, :]
    return x * cos[None, :] + pair * sin[None, :]


@triton.jit(
    do_not_specialize_on_alignment=["position_ptr", "slots_ptr", "table_ptr", "lens_ptr"],
)
def _rotary_decode(
    qkv_ptr, rotary_ptr, position_ptr, q_norm_ptr, k_norm_ptr, eps, kv_ptr, slots_ptr, table_ptr, lens_ptr,
    out_ptr, part_ptr, stats_ptr, counters_ptr, page_stride, v_offset, token_stride, head_stride,
    scale_log2, cap_log2, window,
    N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, HEAD: tl.constexpr, PAGE: tl.constexpr,
    SPLITS: tl.constexpr, SHORTEST: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_S: tl.constexpr, HAS_CAP: tl.constexpr, HAS_NORMS: tl.constexpr,
    IS_INTERLEAVED: tl.constexpr, IS_EXACT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    kv_head, split = tl.program_id(0), tl.program_id(1)
    start_next(PDL)
    wait_for_previous(PDL)
    length = tl.load(lens_ptr).to(tl.int32)
    low, high, used = bounds_of(length, split, window, SPLITS, SHORTEST, BLOCK_N)
    if (split > 0) & (low >= high):
        return
    g, h = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_H)
    is_h = h < HEAD
    if IS_INTERLEAVED:
        other = h ^ 1
    else:
        other = tl.where(h < HEAD // 2, h + HEAD // 2, h - HEAD // 2)
    position = tl.load(position_ptr).to(tl.int64)
    cos = tl.load(rotary_ptr + position * 2 * HEAD + h, mask=is_h, other=0.0)
    sin = tl.load(rotary_ptr + (position * 2 + 1) * HEAD + h, mask=is_h, other=0.0)
    kv_base = kv_ptr + kv_head * head_stride
    if (high == length) & (length > 0):
        one = tl.arange(0, 1)
        line = qkv_ptr + (one + N + kv_head)[:, None] * HEAD
        k = _turned(line, k_norm_ptr, cos, sin, h, other, is_h[None, :], is_h, eps, HEAD, HAS_NORMS)
        v = tl.load(line + K * HEAD + h[None, :], mask=is_h[None, :], other=0.0)
        slot = tl.load(slots_ptr).to(tl.int64)
        place = kv_base + slot // PAGE * page_stride + slot % PAGE * token_stride + h[None, :]
        is_kept = (tl.where(is_h, slot, -1) >= 0)[None, :]
        tl.store(place, k.to(kv_ptr.dtype.element_ty), mask=is_kept)
        tl.store(place + v_offset, v.to(kv_ptr.dtype.element_ty), mask=is_kept)
        # This program reads both again.
        tl.debug_barrier()
    line = qkv_ptr + (kv_head * GROUP + g)[:, None] * HEAD
    mask = (g[:, None] < GROUP) & is_h[None, :]
    q = _turned(line, q_norm_ptr, cos, sin, h, other, mask, is_h, eps, HEAD, HAS_NORMS)
    acc, best, total = attend_share(
        q.to(qkv_ptr.dtype.element_ty), kv_base, table_ptr, low, high, page_stride, v_offset, token_stride,
        scale_log2, cap_log2, HEAD, PAGE, BLOCK_G, BLOCK_N, BLOCK_H, HAS_CAP, IS_EXACT,
    )  # fmt: skip
    finish_share(
        acc, best, total, out_ptr, part_ptr, stats_ptr, counters_ptr, 0, kv_head, split, used, HEAD,
        N, GROUP, HEAD, SPLITS, BLOCK_G, BLOCK_H, BLOCK_S,
    )  # fmt: skip


def rotary_decode(
    qkv_1C: Tensor,
    rotary_P2H: Tensor,
    positions_1: Tensor,
    q_norm_H: Tensor | None,
    k_norm_H: Tensor | None,
    eps: float,
    interleaved: bool,
    heads: int,
    kv_P2tKH: Tensor,
    slots_1: Tensor,
    table_1C: Tensor,
    seq_lens_1: Tensor,
    counters: Tensor,
    max_len: int,
    scale: float,
    window: int,
    softcap: float,
) -> Tensor:
    """Return [1, N, H]; see `kernels/rotary_decode.py`. Only enqueues."""
    _, _, page_tokens, kv_heads, size = kv_P2tKH.shape
    out_1NH = torch.empty(1, heads, size, dtype=qkv_1C.dtype, device=qkv_1C.device)
    shape = shape_of(qkv_1C, kv_P2tKH, 1, heads, max_len, window)
    part, stats = make_parts(out_1NH, kv_heads, shape, counters)
    has_norms = q_norm_H is not None and k_norm_H is not None
    _rotary_decode[(kv_heads, shape["SPLITS"])](
        qkv_1C, rotary_P2H, positions_1, q_norm_H if has_norms else rotary_P2H,
        k_norm_H if has_norms else rotary_P2H, eps, kv_P2tKH, slots_1, table_1C, seq_lens_1,
        out_1NH, part, stats, counters, kv_P2tKH.stride(0), kv_P2tKH.stride(1), kv_P2tKH.stride(2),
        kv_P2tKH.stride(3), scale * LOG2_E, softcap * LOG2_E if softcap else 1.0, window,
        N=heads, K=kv_heads, HEAD=size, PAGE=page_tokens, HAS_CAP=softcap > 0, HAS_NORMS=has_norms,
        IS_INTERLEAVED=interleaved, **shape, **launch_options(qkv_1C),
    )  # fmt: skip
    return out_1NH
