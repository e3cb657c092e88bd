# pyright: reportMissingImports=false, reportIndexIssue=false
"""How do the queries of a span attend on a Hopper GPU? Two groups of warps compute, a third one fetches.

A piece of work is up to 128 queries of one row and head, 64 for each group that computes, and all of the
context or, where pieces are few, a share of it; a second kernel joins shares. There is a program for each
multiprocessor, and it takes one piece after another, long ones first. The third group looks up pages and
copies queries, keys and values into buffers, as far ahead as these go; barriers in shared memory say which
are full and which are free. In each group the scores of tile j and the values of tile j - 1 are in the matrix
unit at once, and the softmax of j runs while those values are still being added; since the groups wait only
for buffers, one group's softmax falls together with the other's products.
Invariant: what `paged_prefill.py` computes up to rounding; nothing behind a row's length or before the first
window of a piece is read.
Source: Shah et al., FlashAttention-3, arXiv 2407.08608, section 3; pages as in Kwon et al., PagedAttention,
arXiv 2309.06180.
T tokens, N query heads, K kv heads, H head size, P pages, t tokens of a block, B rows, M queries of a tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from slipstream.kernels.gpu.launching import launch_options, sms_of, start_next, wait_for_previous
from slipstream.kernels.gpu.paged_decode import LOG2_E
from slipstream.kernels.plugins import sm_of
from slipstream.kernels.prompt_kernels import hopper_obstacle

# Triton 3.7 renamed it.
barrier = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier

# Warps that fetch, the most shares of a context and the keys that one has at least, queries joined at once.
PRODUCERS, MAX_SHARES, SHORTEST, JOINED = 4, 16, 1024, 16


@gluon.jit
def _fetch(buffer, base, place, mask):
    """Start copying lines of K or V into a buffer, zeros where they are masked."""
    # Lost on the way through a reshape: lines are contiguous, and begin at multiples of 16 bytes.
    source = gl.max_contiguous(gl.multiple_of(base + place, [16, 16]), [1, 8])
    async_copy.async_copy_global_to_shared(buffer, source, mask=mask)


@triton.jit
def bounds_of(count, offset, length, window, share, wanted, BLOCK_N: tl.constexpr, SHORTEST: tl.constexpr):
    """Return the first position of 128 queries, and the keys [low, last) of a share of what they see.

    `count` of the row's last tokens are queries, and the piece begins `offset` behind the first of them.
    """
    first_position = length - count + offset
    last = tl.minimum(length, first_position + 128)
    low = 0
    if window > 0:
        # Look-ups are made for eight lines of a page at once.
        low = tl.maximum(0, first_position - window + 1) // 8 * 8
    pieces = tl.minimum(wanted, tl.maximum((last - low) // SHORTEST, 1))
    size = tl.cdiv(tl.cdiv(last - low, pieces), BLOCK_N) * BLOCK_N
    low += share * size
    return first_position, low, tl.minimum(last, low + size)


@gluon.jit
def _piece(
    turn, heads, num_tiles, wanted, tiles_ptr, start_ptr, lens_ptr, window,
    BLOCK_N: gl.constexpr, SHORTEST: gl.constexpr,
):  # fmt: skip
    """Return of this program's piece at a turn: head, row, share, first token, queries left, position, keys.

    The plan's tiles are of 64 queries: pieces go over pairs of them, and of a pair those have work that begin
    128 queries. There are no keys where there is none, as behind the span of a captured step. Every second
    round goes backwards, so that who had the longest piece of one has the shortest of the next.
    """
    wave, place = turn // 2, gl.program_id(0)
    if wave % 2 == 1:
        place = gl.num_programs(0) - 1 - place
    number = wave * gl.num_programs(0) + place
    head, share, tile = number % heads, number // heads % wanted, number // heads // wanted * 2 + turn % 2
    is_tile = tile < num_tiles
    row = gl.load(tiles_ptr + 2 * tile, mask=is_tile, other=0).to(gl.int64)
    offset = gl.load(tiles_ptr + 2 * tile + 1, mask=is_tile, other=1).to(gl.int32)
    token = gl.load(start_ptr + row)
    count = (gl.load(start_ptr + row + 1) - token).to(gl.int32)
    length = gl.load(lens_ptr + row).to(gl.int32)
    position, low, last = bounds_of(count, offset, length, window, share, wanted, BLOCK_N, SHORTEST)
    last = gl.where((offset >= count) | (offset % 128 != 0), low, last)
    return head, row, share, token + offset, count - offset, position, low, last


@gluon.jit
def _produce(
    q_buffers, k_buffers, v_buffers, q_full, k_full, v_full, q_free, k_free, v_free,
    q_ptr, kv_ptr, table_ptr, lens_ptr, start_ptr, tiles_ptr, q_stride_t, q_stride_n,
    page_stride, v_offset, token_stride, head_stride, table_stride, window, heads, num_tiles, num_turns,
    wanted,
    GROUP: gl.constexpr, HEAD: gl.constexpr, PAGE: gl.constexpr, BLOCK_N: gl.constexpr,
    SHORTEST: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Fill the buffers, piece by piece and tile by tile, as they become free."""
    lines: gl.constexpr = gl.BlockedLayout([8, 8], [256 // HEAD, HEAD // 8], [WARPS, 1], [1, 0])
    runs: gl.constexpr = gl.SliceLayout(
        2, gl.BlockedLayout([1, 8, 8], [256 // HEAD, 1, HEAD // 8], [WARPS, 1, 1], [2, 1, 0])
    )
    eight = 8 * gl.arange(0, BLOCK_N // 8, gl.SliceLayout(1, runs))
    within = gl.arange(0, 8, gl.SliceLayout(0, runs)) * token_stride
    n = gl.arange(0, BLOCK_N, gl.SliceLayout(1, lines))
    m = gl.arange(0, 64, gl.SliceLayout(1, lines))
    h = gl.arange(0, HEAD, gl.SliceLayout(0, lines))
    num_done, num_filled = 0, 0
    for turn in range(num_turns):
        head, row, _, token, left, position, low, last = _piece(
            turn, heads, num_tiles, wanted, tiles_ptr, start_ptr, lens_ptr, window, BLOCK_N, SHORTEST
        )  # fmt: skip
        # Look-ups begin at a multiple of eight lines: those before the window may hold anything.
        seen = gl.where(window > 0, position - window + 1, 0)
        if low < last:
            q_base = q_ptr + token * q_stride_t + head * q_stride_n
            for half in gl.static_range(2):
                query = 64 * half + m
                q_place = query[:, None] * q_stride_t + h[None, :]
                mbarrier.wait(q_free.index(half), (num_done & 1) ^ 1)
                _fetch(q_buffers.index(half), q_base, q_place, (query < left)[:, None] & (h[None, :] >= 0))
                async_copy.mbarrier_arrive(q_full.index(half), increment_count=False)
            num_done += 1
            base = kv_ptr + (head // GROUP) * head_stride
            table_base = table_ptr + row * table_stride
            for at in range(low, last, BLOCK_N):
                run = at + eight
                page = gl.load(table_base + run // PAGE, mask=run < last, other=0).to(gl.int64)
                place = page * page_stride + (run % PAGE) * token_stride
                place = gl.reshape(place[:, None] + within[None, :], [BLOCK_N])
                place = gl.convert_layout(place, gl.SliceLayout(1, lines), assert_trivial=True)
                place = place[:, None] + h[None, :]
                mask = ((at + n >= seen) & (at + n < last))[:, None] & (h[None, :] >= 0)
                slot, phase = num_filled % 2, (num_filled // 2) & 1
                mbarrier.wait(k_free.index(slot), phase ^ 1)
                _fetch(k_buffers.index(slot), base, place, mask)
                async_copy.mbarrier_arrive(k_full.index(slot), increment_count=False)
                mbarrier.wait(v_free.index(slot), phase ^ 1)
                _fetch(v_buffers.index(slot), base + v_offset, place, mask)
                async_copy.mbarrier_arrive(v_full.index(slot), increment_count=False)
                num_filled += 1
    async_copy.wait_group(0)


@gluon.jit
def _weigh(
    scores, best, total, q_position, at, window, key, scale_log2, cap_log2,
    IS_MASKED: gl.constexpr, HAS_WINDOW: gl.constexpr, HAS_CAP: gl.constexpr,
):  # fmt: skip
    """Return a tile's weights, by how much older sums shrink, and the running maximum and sum.

    Scores are scaled, soft-capped where asked for, and in units of log2(e), as in `paged_decode.py`.
    """
    scale = scale_log2
    if HAS_CAP:
        doubled = gl.exp2(scores * (scale_log2 * 2.8853900817779268 / cap_log2))
        scores = cap_log2 * (1.0 - 2.0 / (doubled + 1.0))
        scale = 1.0
    if IS_MASKED:
        position = at + key
        is_seen = position[None, :] <= q_position[:, None]
        if HAS_WINDOW:
            is_seen = is_seen & (position[None, :] > q_position[:, None] - window)
        scores = gl.where(is_seen, scores, float("-inf"))
    # Not -inf: a query may see nothing of the first tiles of keys.
    larger = gl.maximum(best, gl.max(scores, 1) * scale)
    weights = gl.exp2(scores * scale - larger[:, None])
    shrink = gl.exp2(best - larger)
    return weights, shrink, larger, total * shrink + gl.sum(weights, 1)


@gluon.jit
def _weigh_tile(
    scores, best, total, q_position, at, whole, window, key, scale_log2, cap_log2,
    HAS_WINDOW: gl.constexpr, HAS_CAP: gl.constexpr,
):  # fmt: skip
    """Weigh a tile, under a mask unless its keys end before `whole`."""
    if at + key.shape[0] <= whole:
        weights, shrink, best, total = _weigh(
            scores, best, total, q_position, at, window, key, scale_log2, cap_log2, False, HAS_WINDOW, HAS_CAP
        )  # fmt: skip
    else:
        weights, shrink, best, total = _weigh(
            scores, best, total, q_position, at, window, key, scale_log2, cap_log2, True, HAS_WINDOW, HAS_CAP
        )  # fmt: skip
    return weights, shrink, best, total


@gluon.jit
def _release(free):
    """Say that this group has read a buffer: all of its warps have."""
    barrier()
    mbarrier.arrive(free)


@gluon.jit
def _leave(
    acc, best, total, out_ptr, part_ptr, stats_ptr, first_part, token, left, head, heads, out_stride_t,
    out_stride_n, HEAD: gl.constexpr, HAS_SHARES: gl.constexpr,
):  # fmt: skip
    """Write 64 queries' output, or of a share its sums, their maxima and the sums of weights."""
    lines: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HEAD, HEAD // 8], [4, 1], [1, 0])
    m = gl.arange(0, 64, gl.SliceLayout(1, lines))
    h = gl.arange(0, HEAD, gl.SliceLayout(0, lines))
    is_there = (m < left)[:, None] & (h[None, :] >= 0)
    if HAS_SHARES:
        place = first_part + (token + m) * heads + head
        gl.store(part_ptr + place[:, None] * HEAD + h[None, :], gl.convert_layout(acc, lines), is_there)
        query = gl.arange(0, 64, best.type.layout)
        place = first_part + (token + query) * heads + head
        gl.store(stats_ptr + 2 * place, best, query < left)
        gl.store(stats_ptr + 2 * place + 1, total, query < left)
    else:
        rows: gl.constexpr = gl.SliceLayout(1, acc.type.layout)
        acc = acc / gl.convert_layout(gl.maximum(total, 1e-30), rows)[:, None]
        place = (token + m)[:, None] * out_stride_t + head * out_stride_n + h[None, :]
        gl.store(out_ptr + place, gl.convert_layout(acc.to(out_ptr.dtype.element_ty), lines), is_there)


@gluon.jit
def _consume(
    q_buffer, k_buffers, v_buffers, q_full, k_full, v_full, q_free, k_free, v_free,
    lens_ptr, start_ptr, tiles_ptr, out_ptr, part_ptr, stats_ptr, part_stride, out_stride_t, out_stride_n,
    scale_log2, cap_log2, window, heads, num_tiles, num_turns, wanted,
    HALF: gl.constexpr, HEAD: gl.constexpr, BLOCK_N: gl.constexpr, SHORTEST: gl.constexpr,
    HAS_CAP: gl.constexpr, HAS_WINDOW: gl.constexpr, HAS_SHARES: gl.constexpr,
):  # fmt: skip
    """Compute one half of the queries of each piece, 64, as its buffers become full."""
    scored: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    summed: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, summed, 2)
    dtype: gl.constexpr = out_ptr.dtype.element_ty
    key = gl.arange(0, BLOCK_N, gl.SliceLayout(0, scored))
    query = gl.arange(0, 64, gl.SliceLayout(1, scored))
    nothing = gl.full([64, BLOCK_N], 0.0, gl.float32, scored)
    num_done, num_read = 0, 0
    for turn in range(num_turns):
        head, _, share, token, left, position, low, last = _piece(
            turn, heads, num_tiles, wanted, tiles_ptr, start_ptr, lens_ptr, window, BLOCK_N, SHORTEST
        )  # fmt: skip
        if low < last:
            q_position = position + 64 * HALF + query
            # Keys that every query sees; under a window none are taken for such.
            whole = low
            if not HAS_WINDOW:
                whole = position + 64 * HALF + 1
            best = gl.full([64], -1e30, gl.float32, gl.SliceLayout(1, scored))
            total = gl.full([64], 0.0, gl.float32, gl.SliceLayout(1, scored))
            acc = gl.full([64, HEAD], 0.0, gl.float32, summed)

            mbarrier.wait(q_full, num_done & 1)
            mbarrier.wait(k_full.index(num_read % 2), (num_read // 2) & 1)
            fence_async_shared()
            keys = k_buffers.index(num_read % 2).permute((1, 0))
            scores = warpgroup_mma(q_buffer, keys, nothing, use_acc=False)
            _release(k_free.index(num_read % 2))
            weights, shrink, best, total = _weigh(
                scores, best, total, q_position, low, window, key, scale_log2, cap_log2, True, HAS_WINDOW,
                HAS_CAP,
            )  # fmt: skip
            p = gl.convert_layout(weights.to(dtype), operand)
            for at in range(low + BLOCK_N, last, BLOCK_N):
                before, now = num_read, num_read + 1
                mbarrier.wait(k_full.index(now % 2), (now // 2) & 1)
                fence_async_shared()
                keys = k_buffers.index(now % 2).permute((1, 0))
                scores_next = warpgroup_mma(q_buffer, keys, nothing, use_acc=False, is_async=True)
                mbarrier.wait(v_full.index(before % 2), (before // 2) & 1)
                fence_async_shared()
                sums = warpgroup_mma(p, v_buffers.index(before % 2), acc, is_async=True)
                scores = warpgroup_mma_wait(1, deps=(scores_next,))
                _release(k_free.index(now % 2))
                weights, shrink, best, total = _weigh_tile(
                    scores, best, total, q_position, at, whole, window, key, scale_log2, cap_log2, HAS_WINDOW,
                    HAS_CAP,
                )  # fmt: skip
                acc = warpgroup_mma_wait(0, deps=(sums,))
                _release(v_free.index(before % 2))
                p = gl.convert_layout(weights.to(dtype), operand)
                acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, summed))[:, None]
                num_read = now
            _release(q_free)
            mbarrier.wait(v_full.index(num_read % 2), (num_read // 2) & 1)
            fence_async_shared()
            acc = warpgroup_mma(p, v_buffers.index(num_read % 2), acc)
            _release(v_free.index(num_read % 2))
            num_read += 1
            num_done += 1
            # Of this half: its first token's line of the output, and how many queries are real.
            _leave(
                acc, best, total, out_ptr, part_ptr, stats_ptr, share.to(gl.int64) * part_stride,
                token + 64 * HALF, left - 64 * HALF, head, heads, out_stride_t, out_stride_n, HEAD,
                HAS_SHARES,
            )  # fmt: skip


@gluon.jit(
    do_not_specialize=["part_stride", "table_stride", "num_tiles", "num_turns", "wanted"],
    do_not_specialize_on_alignment=["table_ptr", "lens_ptr", "start_ptr", "tiles_ptr"],
)
def _hopper_prefill(
    q_ptr, kv_ptr, table_ptr, lens_ptr, start_ptr, tiles_ptr, out_ptr, part_ptr, stats_ptr, part_stride,
    q_stride_t, q_stride_n, page_stride, v_offset, token_stride, head_stride, table_stride,
    out_stride_t, out_stride_n, scale_log2, cap_log2, window, heads, num_tiles, num_turns, wanted,
    GROUP: gl.constexpr, HEAD: gl.constexpr, PAGE: gl.constexpr, BLOCK_N: gl.constexpr,
    SHORTEST: gl.constexpr, HAS_CAP: gl.constexpr, HAS_WINDOW: gl.constexpr, HAS_SHARES: gl.constexpr,
    PRODUCERS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    shared: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    flags: gl.constexpr = mbarrier.MBarrierLayout()
    q_buffers = gl.allocate_shared_memory(dtype, [2, 64, HEAD], shared)
    k_buffers = gl.allocate_shared_memory(dtype, [2, BLOCK_N, HEAD], shared)
    v_buffers = gl.allocate_shared_memory(dtype, [2, BLOCK_N, HEAD], shared)
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], flags)
    k_full = gl.allocate_shared_memory(gl.int64, [2, 1], flags)
    v_full = gl.allocate_shared_memory(gl.int64, [2, 1], flags)
    q_free = gl.allocate_shared_memory(gl.int64, [2, 1], flags)
    k_free = gl.allocate_shared_memory(gl.int64, [2, 1], flags)
    v_free = gl.allocate_shared_memory(gl.int64, [2, 1], flags)
    for i in gl.static_range(2):
        # Each thread that copies says when its copies are done; each group when it has read.
        mbarrier.init(q_full.index(i), count=32 * PRODUCERS)
        mbarrier.init(k_full.index(i), count=32 * PRODUCERS)
        mbarrier.init(v_full.index(i), count=32 * PRODUCERS)
        mbarrier.init(q_free.index(i), count=1)
        mbarrier.init(k_free.index(i), count=2)
        mbarrier.init(v_free.index(i), count=2)
    barrier()
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    # A half of the queries is one group's alone, a tile of keys and values both read.
    gl.warp_specialize(
        [
            (_consume, (
                q_buffers.index(0), k_buffers, v_buffers, q_full.index(0), k_full, v_full,
                q_free.index(0), k_free, v_free, lens_ptr, start_ptr, tiles_ptr, out_ptr, part_ptr, stats_ptr,
                part_stride, out_stride_t, out_stride_n, scale_log2, cap_log2, window, heads, num_tiles,
                num_turns, wanted, 0, HEAD, BLOCK_N, SHORTEST, HAS_CAP, HAS_WINDOW, HAS_SHARES,
            )),
            (_consume, (
                q_buffers.index(1), k_buffers, v_buffers, q_full.index(1), k_full, v_full,
                q_free.index(1), k_free, v_free, lens_ptr, start_ptr, tiles_ptr, out_ptr, part_ptr, stats_ptr,
                part_stride, out_stride_t, out_stride_n, scale_log2, cap_log2, window, heads, num_tiles,
                num_turns, wanted, 1, HEAD, BLOCK_N, SHORTEST, HAS_CAP, HAS_WINDOW, HAS_SHARES,
            )),
            (_produce, (
                q_buffers, k_buffers, v_buffers, q_full, k_full, v_full, q_free, k_free, v_free,
                q_ptr, kv_ptr, table_ptr, lens_ptr, start_ptr, tiles_ptr, q_stride_t, q_stride_n,
                page_stride, v_offset, token_stride, head_stride, table_stride, window, heads, num_tiles,
                num_turns, wanted, GROUP, HEAD, PAGE, BLOCK_N, SHORTEST, PRODUCERS,
            )),
        ],
        [4, PRODUCERS],
        [216, 72],
    )  # fmt: skip


@triton.jit(
    do_not_specialize=["part_stride", "wanted"],
    do_not_specialize_on_alignment=["lens_ptr", "start_ptr", "tiles_ptr"],
)
def _join_shares(
    part_ptr, stats_ptr, out_ptr, lens_ptr, start_ptr, tiles_ptr, part_stride, out_stride_t, out_stride_n,
    window, wanted,
    HEAD: tl.constexpr, BLOCK_N: tl.constexpr, SHORTEST: tl.constexpr, JOINED: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Join the shares of some queries of a tile and a head by their maxima and sums."""
    tile, head = tl.program_id(0) // (64 // JOINED), tl.program_id(1)
    start_next(PDL)
    wait_for_previous(PDL)
    row = tl.load(tiles_ptr + 2 * tile).to(tl.int64)
    offset = tl.load(tiles_ptr + 2 * tile + 1).to(tl.int32)
    token = tl.load(start_ptr + row)
    count = (tl.load(start_ptr + row + 1) - token).to(tl.int32)
    length = tl.load(lens_ptr + row).to(tl.int32)
    query = offset + tl.program_id(0) % (64 // JOINED) * JOINED + tl.arange(0, JOINED)
    h = tl.arange(0, HEAD)
    is_query = query < count
    acc = tl.zeros((JOINED, HEAD), tl.float32)
    best = tl.full((JOINED,), -1e30, tl.float32)
    total = tl.zeros((JOINED,), tl.float32)
    for share in range(0, wanted):
        _, low, last = bounds_of(count, offset // 128 * 128, length, window, share, wanted, BLOCK_N, SHORTEST)
        if low < last:
            place = tl.cast(share, tl.int64) * part_stride + (token + query) * tl.num_programs(1) + head
            theirs = tl.load(stats_ptr + 2 * place, mask=is_query, other=-1e30)
            sums = tl.load(stats_ptr + 2 * place + 1, mask=is_query, other=0.0)
            larger = tl.maximum(best, theirs)
            mine, other = tl.exp2(best - larger), tl.exp2(theirs - larger)
            values = tl.load(part_ptr + place[:, None] * HEAD + h[None, :], mask=is_query[:, None], other=0.0)
            acc = acc * mine[:, None] + values * other[:, None]
            total, best = total * mine + sums * other, larger
    out = acc / tl.maximum(total, 1e-30)[:, None]
    at_out = out_ptr + (token + query)[:, None] * out_stride_t + head * out_stride_n + h[None, :]
    tl.store(at_out, out.to(out_ptr.dtype.element_ty), mask=is_query[:, None])


def serves(q_TNH: Tensor, kv_P2tKH: Tensor) -> bool:
    """Say whether the kernel can do this; `kernels/prompt_kernels.py` has the rule."""
    if not q_TNH.is_cuda or q_TNH.dtype != kv_P2tKH.dtype:
        return False
    obstacle = hopper_obstacle(
        sm=sm_of(q_TNH.device.index),
        dtype=str(q_TNH.dtype).removeprefix("torch."),
        head_dim=q_TNH.shape[2],
        block_tokens=kv_P2tKH.shape[2],
    )
    return not obstacle


def choose_shares(num_tiles: int, heads: int, *, sms: int) -> int:
    """Return how many shares a long context is to have: one where there is work for all without them.

    A power of two, so that a step that is padded to some tiles more is shared out as the step itself is.
    """
    pieces = (num_tiles + 1) // 2 * heads
    if pieces >= 2 * sms:
        return 1
    return 1 << min(MAX_SHARES, max(1, 4 * sms // pieces)).bit_length() - 1


def hopper_prefill(
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
    *,
    wanted: int | None = None,
) -> None:
    """Attend and write `out_TNH`; see `kernels/paged_prefill.py`. Only enqueues. `wanted` shares, to try."""
    tokens, heads, size = q_TNH.shape
    _, _, page_tokens, kv_heads, _ = kv_P2tKH.shape
    num_tiles, sms = len(tiles_M2), sms_of(q_TNH)
    if num_tiles == 0:
        return
    wanted = wanted or choose_shares(num_tiles, heads, sms=sms)
    num_pieces = (num_tiles + 1) // 2 * heads * wanted
    programs = min(num_pieces, sms)
    num_turns = 2 * triton.cdiv(num_pieces, programs)
    part = stats = out_TNH
    if wanted > 1:
        part = torch.empty(wanted, tokens, heads, size, dtype=torch.float32, device=q_TNH.device)
        stats = torch.empty(wanted, tokens, heads, 2, dtype=torch.float32, device=q_TNH.device)
    block_n, options = 64 if size > 128 else 128, launch_options(q_TNH)
    strides = (out_TNH.stride(0), out_TNH.stride(1))
    _hopper_prefill[(programs,)](
        q_TNH, kv_P2tKH, table_BC, seq_lens_B, query_start_B, tiles_M2, out_TNH, part, stats, tokens * heads,
        q_TNH.stride(0), q_TNH.stride(1), kv_P2tKH.stride(0), kv_P2tKH.stride(1), kv_P2tKH.stride(2),
        kv_P2tKH.stride(3), table_BC.stride(0), *strides, scale * LOG2_E,
        softcap * LOG2_E if softcap else 1.0, window, heads, num_tiles, num_turns, wanted,
        GROUP=heads // kv_heads, HEAD=size, PAGE=page_tokens, BLOCK_N=block_n, SHORTEST=SHORTEST,
        HAS_CAP=softcap > 0, HAS_WINDOW=window > 0, HAS_SHARES=wanted > 1, PRODUCERS=PRODUCERS, num_warps=4,
        **options,
    )  # fmt: skip
    if wanted > 1:
        _join_shares[(num_tiles * 64 // JOINED, heads)](
            part, stats, out_TNH, seq_lens_B, query_start_B, tiles_M2, tokens * heads, *strides, window,
            wanted, HEAD=size, BLOCK_N=block_n, SHORTEST=SHORTEST, JOINED=JOINED, num_warps=4, **options,
        )  # fmt: skip
