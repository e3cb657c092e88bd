# pyright: reportMissingImports=false, reportIndexIssue=false
"""How does one query per row attend to its pages on a GPU? Split over the context, kv head by kv head.

A program takes one row, one kv head and one share of the context: it reads each K and V once for all query
heads that use it (as the 16 lines of a tensor core product) and keeps a running softmax. With several shares
the program that ends last joins them by their maxima and sums.
Invariant: nothing behind `seq_lens` or before the window is read; a row of length 0 gives zeros.
Sources: Milakov and Gimelshein, Online normalizer calculation for softmax, arXiv 1805.02867; Dao et al.,
Flash-Decoding for long-context inference (2023).
R rows, N query heads, K kv heads, G = N / K, H head size, P pages, t tokens of a block, S shares.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from slipstream.kernels.gpu.launching import launch_options, sms_of, start_next, wait_for_previous

LOG2_E = math.log2(math.e)
# Programs per multiprocessor that keep memory busy.
PROGRAMS_PER_SM = 4
# The most shares worth joining, and of contexts that can be long. How long they are is not known where a step
# is captured: more programs, with more registers to join in one turn, cost a short context microseconds.
MAX_SPLITS, MAX_LONG_SPLITS = 16, 32
LONG = 16384
# Fewer positions than this are not shared: joining would cost more.
MIN_SHARE = 64
# Values of parts that are joined at once, 32 for each thread, and of long contexts: all parts, in one turn.
JOINED_VALUES, LONG_JOINED_VALUES = 4096, 16384


@triton.constexpr_function
def lines_of(group):
    """Return the smallest power of two that holds the query heads of a kv head."""
    return triton.next_power_of_2(group)


@triton.jit
def capped_scores(scores, scale_log2, cap_log2, HAS_CAP: tl.constexpr):
    """Return the scores, scaled and soft-capped, times log2(e), as the two scalars already are.

    cap * tanh(x / cap), with tanh(y) = 1 - 2 / (exp(2y) + 1).
    """
    scores = scores * scale_log2
    if HAS_CAP:
        scores = cap_log2 * (1.0 - 2.0 / (tl.exp(2.0 * scores / cap_log2) + 1.0))
    return scores


@triton.jit
def add_parts(acc, best, total, part_ptr, stats_ptr, line_SG, is_part_SG, h, HEAD: tl.constexpr):
    """Add the parts that stand at some lines to what is joined already: [G, H], and maxima and sums [G].

    All of them are on their way at once, and past the L1, which knows nothing of other programs' stores.
    """
    part_best = tl.load(stats_ptr + line_SG * 2, mask=is_part_SG, other=-1e30, cache_modifier=".cg")
    part_total = tl.load(stats_ptr + line_SG * 2 + 1, mask=is_part_SG, other=0.0, cache_modifier=".cg")
    place = part_ptr + line_SG[:, :, None] * HEAD + h[None, None, :]
    is_value = is_part_SG[:, :, None] & (h < HEAD)[None, None, :]
    values = tl.load(place, mask=is_value, other=0.0, cache_modifier=".cg")
    larger = tl.maximum(best, tl.max(part_best, 0))
    weights = tl.exp2(part_best - larger[None, :])
    shrink = tl.exp2(best - larger)
    total = total * shrink + tl.sum(part_total * weights, 0)
    acc = acc * shrink[:, None] + tl.sum(values * weights[:, :, None], 0)
    return acc, larger, total


@triton.jit
def store_joined(acc, total, out_ptr, out_stride_n, kv_head, h, GROUP: tl.constexpr, HEAD: tl.constexpr):
    """Write the heads [G, H] of a row that one kv head serves, `out_ptr` being the row's."""
    g = tl.arange(0, acc.shape[0])
    out = acc / tl.maximum(total, 1e-30)[:, None]
    at_out = out_ptr + (kv_head * GROUP + g)[:, None] * out_stride_n + h[None, :]
    tl.store(at_out, out.to(out_ptr.dtype.element_ty), mask=(g[:, None] < GROUP) & (h[None, :] < HEAD))


@triton.jit
def bounds_of(length, split, window, SPLITS: tl.constexpr, SHORTEST: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return the positions [low, high) of a share, and how many shares are not empty: one at least."""
    first = 0
    if window > 0:
        first = tl.maximum(0, length - window)
    share = tl.cdiv(tl.maximum(tl.cdiv(length - first, SPLITS), SHORTEST), BLOCK_N) * BLOCK_N
    low = first + split * share
    return low, tl.minimum(length, low + share), tl.maximum(tl.cdiv(length - first, share), 1)


@triton.jit
def attend_share(
    q, kv_base, table_base, low, high, page_stride, v_offset, token_stride, scale_log2, cap_log2,
    HEAD: tl.constexpr, PAGE: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr, HAS_CAP: tl.constexpr, IS_EXACT: tl.constexpr,
):  # fmt: skip
    """Return the weighted sum of values over [low, high), the largest score and the sum of weights."""
    h, n = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_N)
    best = tl.full((BLOCK_G,), -1e30, tl.float32)
    total = tl.zeros((BLOCK_G,), tl.float32)
    acc = tl.zeros((BLOCK_G, BLOCK_H), tl.float32)
    for at in range(low, high, BLOCK_N):
        position = at + n
        is_seen = position < high
        page = tl.load(table_base + position // PAGE, mask=is_seen, other=0).to(tl.int64)
        place = page * page_stride + (position % PAGE) * token_stride
        mask = is_seen[:, None] & (h[None, :] < HEAD)
        k = tl.load(kv_base + place[:, None] + h[None, :], mask=mask, other=0.0).to(q.dtype)
        v = tl.load(kv_base + v_offset + place[:, None] + h[None, :], mask=mask, other=0.0).to(q.dtype)
        if IS_EXACT:
            scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        else:
            scores = tl.dot(q, tl.trans(k))
        scores = capped_scores(scores, scale_log2, cap_log2, HAS_CAP)
        scores = tl.where(is_seen[None, :], scores, float("-inf"))
        larger = tl.maximum(best, tl.max(scores, 1))
        weights = tl.exp2(scores - larger[:, None])
        shrink = tl.exp2(best - larger)
        total = total * shrink + tl.sum(weights, 1)
        acc = acc * shrink[:, None]
        if IS_EXACT:
            acc += tl.dot(weights, v, input_precision="ieee")
        else:
            acc += tl.dot(weights.to(v.dtype), v)
        best = larger
    return acc, best, total


@triton.jit
def finish_share(
    acc, best, total, out_ptr, part_ptr, stats_ptr, counters_ptr, row, kv_head, split, used, out_stride_n,
    N: tl.constexpr, GROUP: tl.constexpr, HEAD: tl.constexpr, SPLITS: tl.constexpr, BLOCK_G: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Write the output of a row and kv head, or this share of it; whoever comes last joins the shares."""
    g, h = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_H)
    heads = kv_head * GROUP + g
    if used == 1:
        store_joined(acc, total, out_ptr, out_stride_n, kv_head, h, GROUP, HEAD)
    elif SPLITS > 1:
        line = (row * SPLITS + split) * N + heads
        is_head = (g[:, None] < GROUP) & (h[None, :] < HEAD)
        tl.store(part_ptr + line[:, None] * HEAD + h[None, :], acc, mask=is_head)
        tl.store(stats_ptr + line * 2, best, mask=g < GROUP)
        tl.store(stats_ptr + line * 2 + 1, total, mask=g < GROUP)
        # All lanes have stored before one of them says so.
        tl.debug_barrier()
        counter = counters_ptr + row * (N // GROUP) + kv_head
        if tl.atomic_add(counter, 1, sem="acq_rel") == used - 1:
            few: tl.constexpr = lines_of(GROUP)
            f, s = tl.arange(0, few), tl.arange(0, BLOCK_S)
            joined = tl.zeros((few, BLOCK_H), tl.float32)
            largest, sums = tl.full((few,), -1e30, tl.float32), tl.zeros((few,), tl.float32)
            for at in range(0, used, BLOCK_S):
                lines = ((row * SPLITS + at + s) * N)[:, None] + (kv_head * GROUP + f)[None, :]
                is_part = (at + s < used)[:, None] & (f < GROUP)[None, :]
                joined, largest, sums = add_parts(
                    joined, largest, sums, part_ptr, stats_ptr, lines, is_part, h, HEAD
                )
            store_joined(joined, sums, out_ptr, out_stride_n, kv_head, h, GROUP, HEAD)
            tl.store(counter, 0)


@triton.jit(
    do_not_specialize=["table_stride"],
    do_not_specialize_on_alignment=["lens_ptr", "table_ptr"],
)
def _decode(
    q_ptr, kv_ptr, table_ptr, lens_ptr, out_ptr, part_ptr, stats_ptr, counters_ptr,
    q_stride_r, q_stride_n, page_stride, v_offset, token_stride, head_stride, table_stride,
    out_stride_r, out_stride_n, scale_log2, cap_log2, window,
    N: tl.constexpr, GROUP: tl.constexpr, HEAD: tl.constexpr, PAGE: tl.constexpr, SPLITS: tl.constexpr,
    SHORTEST: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_S: tl.constexpr, HAS_CAP: tl.constexpr, IS_EXACT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start_next(PDL)
    wait_for_previous(PDL)
    length = tl.load(lens_ptr + row).to(tl.int32)
    low, high, used = bounds_of(length, split, window, SPLITS, SHORTEST, BLOCK_N)
    # The first share always runs, so that an empty row has one.
    if (split > 0) & (low >= high):
        return
    g, h = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_H)
    heads = kv_head * GROUP + g
    is_head = (g[:, None] < GROUP) & (h[None, :] < HEAD)
    q = tl.load(q_ptr + row * q_stride_r + heads[:, None] * q_stride_n + h[None, :], mask=is_head, other=0.0)
    acc, best, total = attend_share(
        q, kv_ptr + kv_head * head_stride, table_ptr + row.to(tl.int64) * table_stride, low, high,
        page_stride, v_offset, token_stride, scale_log2, cap_log2,
        HEAD, PAGE, BLOCK_G, BLOCK_N, BLOCK_H, HAS_CAP, IS_EXACT,
    )  # fmt: skip
    finish_share(
        acc, best, total, out_ptr + row * out_stride_r, part_ptr, stats_ptr, counters_ptr, row, kv_head,
        split, used, out_stride_n, N, GROUP, HEAD, SPLITS, BLOCK_G, BLOCK_H, BLOCK_S,
    )  # fmt: skip


def choose_splits(num_programs: int, max_len: int, *, sms: int) -> int:
    """Return into how many shares a context of at most `max_len` is cut; a function of host bounds alone."""
    wanted = sms * PROGRAMS_PER_SM // max(1, num_programs)
    most = MAX_LONG_SPLITS if max_len > LONG else MAX_SPLITS
    return max(1, min(wanted, most, -(-max_len // MIN_SHARE)))


def paged_decode(
    q_RNH: Tensor,
    kv_P2tKH: Tensor,
    table_RC: Tensor,
    seq_lens_R: Tensor,
    out_RNH: Tensor,
    counters: Tensor,
    max_len: int,
    scale: float,
    window: int,
    softcap: float,
) -> None:
    """Attend and write `out_RNH`; see `kernels/paged_decode.py`. Only enqueues."""
    rows, heads, size = q_RNH.shape
    _, _, page_tokens, kv_heads, _ = kv_P2tKH.shape
    if rows == 0:
        return
    shape = shape_of(q_RNH, kv_P2tKH, rows, heads, max_len, window)
    part, stats = make_parts(out_RNH, kv_heads, shape, counters)
    _decode[(rows, kv_heads, shape["SPLITS"])](
        q_RNH, kv_P2tKH, table_RC, seq_lens_R, out_RNH, part, stats, counters,
        q_RNH.stride(0), q_RNH.stride(1), kv_P2tKH.stride(0), kv_P2tKH.stride(1), kv_P2tKH.stride(2),
        kv_P2tKH.stride(3), table_RC.stride(0), out_RNH.stride(0), out_RNH.stride(1),
        scale * LOG2_E, softcap * LOG2_E if softcap else 1.0, window,
        N=heads, HEAD=size, PAGE=page_tokens, HAS_CAP=softcap > 0, **shape, **launch_options(q_RNH),
    )  # fmt: skip


def shape_of(x: Tensor, kv_P2tKH: Tensor, rows: int, heads: int, max_len: int, window: int) -> dict[str, Any]:
    """Return how a step of `rows` rows is cut, and how its programs run: keyword arguments of a launch."""
    kv_heads, size = kv_P2tKH.shape[3:]
    splits = choose_splits(rows * kv_heads, min(max_len, window) if window else max_len, sms=sms_of(x))
    values = LONG_JOINED_VALUES if splits > MAX_SPLITS else JOINED_VALUES
    is_exact = x.dtype == torch.float32
    block_h = max(16, triton.next_power_of_2(size))
    return {
        "GROUP": heads // kv_heads,
        "SPLITS": splits,
        "SHORTEST": MIN_SHARE,
        "BLOCK_G": max(16, triton.next_power_of_2(heads // kv_heads)),
        "BLOCK_N": 32 if is_exact or block_h > 128 else 64,
        "BLOCK_H": block_h,
        "BLOCK_S": min(triton.next_power_of_2(splits), parts_at_once(heads // kv_heads, size, values=values)),
        "IS_EXACT": is_exact,
        "num_warps": 4,
        "num_stages": 2 if is_exact else 3,
    }


def parts_at_once(group: int, size: int, *, values: int = JOINED_VALUES) -> int:
    """Return how many parts, each of a kv head's query heads, are joined at once; a power of two."""
    part: int = triton.next_power_of_2(group) * max(16, triton.next_power_of_2(size))
    return max(1, min(MAX_LONG_SPLITS, values // part))


def make_parts(
    out_RNH: Tensor, kv_heads: int, shape: dict[str, Any], counters: Tensor
) -> tuple[Tensor, Tensor]:
    """Return memory for the shares: their sums of values, and their maxima and sums of weights."""
    rows, heads, size = out_RNH.shape
    if shape["SPLITS"] == 1:
        return out_RNH, out_RNH
    assert rows * kv_heads <= len(counters), "a counter for each row and kv head"
    lines, device = rows * shape["SPLITS"] * heads, out_RNH.device
    part = torch.empty(lines, size, dtype=torch.float32, device=device)
    return part, torch.empty(lines, 2, dtype=torch.float32, device=device)
