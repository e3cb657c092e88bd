# pyright: reportMissingImports=false, reportIndexIssue=false
"""How do the queries of a span attend to its pages on a GPU? Tiles of queries, on tensor cores.

A program takes up to `BLOCK_M` queries of one row and one head, walks over the keys they can see, and keeps a
running softmax. Tiles of keys that every query of the tile sees need no mask and come first; the last ones
hold the diagonal.
Invariant: nothing behind a row's length or before the tile's first window is read.
Source: Dao, FlashAttention-2, arXiv 2307.08691; pages as in Kwon et al., PagedAttention, arXiv 2309.06180.
T tokens, N query heads, K kv heads, H head size, P pages, t tokens of a block, B rows, M queries of a tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from slipstream.kernels.gpu.launching import launch_options, start_next, wait_for_previous
from slipstream.kernels.gpu.paged_decode import LOG2_E, capped_scores
from slipstream.kernels.query_tiles import tile_queries


@triton.jit
def _visit(
    acc, best, total, q, q_position, kv_base, v_offset, table_base, at, last,
    page_stride, token_stride, scale_log2, cap_log2, window, n, h,
    HEAD: tl.constexpr, PAGE: tl.constexpr, HAS_CAP: tl.constexpr, HAS_WINDOW: tl.constexpr,
    IS_DIAGONAL: tl.constexpr, IS_EXACT: tl.constexpr, IS_PADDED: tl.constexpr,
):  # fmt: skip
    """Take one tile of keys into the running softmax."""
    position = at + n
    if IS_DIAGONAL:
        page = tl.load(table_base + position // PAGE, mask=position < last, other=0).to(tl.int64)
        is_there = (position < last)[:, None] & (h[None, :] < HEAD)
    else:
        page = tl.load(table_base + position // PAGE).to(tl.int64)
        is_there = (n[:, None] >= 0) & (h[None, :] < HEAD)
    place = (page * page_stride + (position % PAGE) * token_stride)[:, None] + h[None, :]
    if IS_DIAGONAL or IS_PADDED:
        k = tl.load(kv_base + place, mask=is_there, other=0.0).to(q.dtype)
        v = tl.load(kv_base + v_offset + place, mask=is_there, other=0.0).to(q.dtype)
    else:
        k = tl.load(kv_base + place).to(q.dtype)
        v = tl.load(kv_base + v_offset + place).to(q.dtype)
    if IS_EXACT:
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    else:
        scores = tl.dot(q, tl.trans(k))
    scores = capped_scores(scores, scale_log2, cap_log2, HAS_CAP)
    if IS_DIAGONAL:
        scores = tl.where(position[None, :] <= q_position[:, None], scores, float("-inf"))
    if HAS_WINDOW:
        scores = tl.where(position[None, :] > q_position[:, None] - window, scores, float("-inf"))
    # Not -inf: a query of this tile may see nothing of the first tiles of keys.
    larger = tl.maximum(tl.maximum(best, tl.max(scores, 1)), -1e30)
    weights = tl.exp2(scores - larger[:, None])
    shrink = tl.exp2(best - larger)
    total = total * shrink + tl.sum(weights, 1)
    acc = acc * shrink[:, None]
    if IS_EXACT:
        acc += tl.dot(weights, v, input_precision="ieee")
    else:
        acc = tl.dot(weights.to(v.dtype), v, acc)
    return acc, larger, total


@triton.jit
def _prefill(
    q_ptr, kv_ptr, table_ptr, lens_ptr, start_ptr, tiles_ptr, out_ptr,
    q_stride_t, q_stride_n, page_stride, v_offset, token_stride, head_stride, table_stride,
    out_stride_t, out_stride_n, scale_log2, cap_log2, window,
    GROUP: tl.constexpr, HEAD: tl.constexpr, PAGE: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, HAS_CAP: tl.constexpr, HAS_WINDOW: tl.constexpr,
    IS_EXACT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    tile, head = tl.program_id(0), tl.program_id(1)
    start_next(PDL)
    wait_for_previous(PDL)
    row = tl.load(tiles_ptr + 2 * tile).to(tl.int64)
    offset = tl.load(tiles_ptr + 2 * tile + 1).to(tl.int32)
    token = tl.load(start_ptr + row)
    count = (tl.load(start_ptr + row + 1) - token).to(tl.int32)
    length = tl.load(lens_ptr + row).to(tl.int32)
    # A captured step has tiles for its longest span; there is nothing to do behind a shorter one.
    if offset >= count:
        return
    m, n, h = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_H)
    is_query = (offset + m < count)[:, None] & (h[None, :] < HEAD)
    q_line = (token + offset + m)[:, None]
    q = tl.load(q_ptr + q_line * q_stride_t + head * q_stride_n + h[None, :], mask=is_query, other=0.0)
    first_position = length - count + offset
    q_position = first_position + m
    last = tl.minimum(length, first_position + BLOCK_M)
    low = 0
    if HAS_WINDOW:
        low = tl.maximum(0, first_position - window + 1)
    # Keys up to the first query's own are seen by the whole tile.
    whole = low + (first_position + 1 - low) // BLOCK_N * BLOCK_N
    best = tl.full((BLOCK_M,), -1e30, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_H), tl.float32)
    kv_base = kv_ptr + (head // GROUP) * head_stride
    table_base = table_ptr + row * table_stride
    for at in range(low, whole, BLOCK_N):
        acc, best, total = _visit(
            acc, best, total, q, q_position, kv_base, v_offset, table_base, at, last,
            page_stride, token_stride, scale_log2, cap_log2, window, n, h,
            HEAD, PAGE, HAS_CAP, HAS_WINDOW, False, IS_EXACT, HEAD != BLOCK_H,
        )  # fmt: skip
    for at in range(whole, last, BLOCK_N):
        acc, best, total = _visit(
            acc, best, total, q, q_position, kv_base, v_offset, table_base, at, last,
            page_stride, token_stride, scale_log2, cap_log2, window, n, h,
            HEAD, PAGE, HAS_CAP, HAS_WINDOW, True, IS_EXACT, HEAD != BLOCK_H,
        )  # fmt: skip
    out = acc / tl.maximum(total, 1e-30)[:, None]
    at_out = out_ptr + q_line * out_stride_t + head * out_stride_n + h[None, :]
    tl.store(at_out, out.to(out_ptr.dtype.element_ty), mask=is_query)


def paged_prefill(
    q_TNH: Tensor,
    kv_P2tKH: Tensor,
    table_BC: Tensor,
    seq_lens_B: Tensor,
    query_start_B: Tensor,
    tiles_M2: Tensor,
    out_TNH: Tensor,
    scale: float,
    window: int,
    softcap: float,
) -> None:
    """Attend and write `out_TNH`; see `kernels/paged_prefill.py`. Only enqueues."""
    _, heads, size = q_TNH.shape
    _, _, page_tokens, kv_heads, _ = kv_P2tKH.shape
    if len(tiles_M2) == 0:
        return
    is_exact = q_TNH.dtype == torch.float32
    block_h = max(16, triton.next_power_of_2(size))
    block_m = tile_queries(q_TNH.dtype)
    block_n = 32 if is_exact else 64
    _prefill[(len(tiles_M2), heads)](
        q_TNH, kv_P2tKH, table_BC, seq_lens_B, query_start_B, tiles_M2, out_TNH,
        q_TNH.stride(0), q_TNH.stride(1), kv_P2tKH.stride(0), kv_P2tKH.stride(1), kv_P2tKH.stride(2),
        kv_P2tKH.stride(3), table_BC.stride(0), out_TNH.stride(0), out_TNH.stride(1),
        scale * LOG2_E, softcap * LOG2_E if softcap else 1.0, window,
        GROUP=heads // kv_heads, HEAD=size, PAGE=page_tokens, BLOCK_M=block_m, BLOCK_N=block_n,
        BLOCK_H=block_h, HAS_CAP=softcap > 0, HAS_WINDOW=window > 0, IS_EXACT=is_exact,
        num_warps=4, num_stages=1 if is_exact else 2,
        **launch_options(q_TNH),
    )  # fmt: skip
