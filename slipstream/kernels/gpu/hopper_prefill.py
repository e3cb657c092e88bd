# pyright: reportMissingImports=false, reportIndexIssue=false
"""How do the queries of a span attend on a Hopper GPU? Two groups of warps compute, a third one fetches.

A program takes up to 128 queries of one row and head, 64 for each group that computes. The third looks up the
pages and copies keys and values into buffers, two tiles ahead; barriers in shared memory say which are full
and which are free. In each group the scores of tile j and the values of tile j - 1 are in the matrix unit at
once, and the softmax of j runs while those values are still being added; since the groups wait only for
buffers, one group's softmax falls together with the other's products.
Invariant: what `paged_prefill.py` computes up to rounding; nothing behind a row's length is read.
Source: Shah et al., FlashAttention-3, arXiv 2407.08608, section 3; pages as in Kwon et al., PagedAttention,
arXiv 2309.06180.
T tokens, N query heads, K kv heads, H head size, P pages, t tokens of a block, B rows, M queries of a tile.
"""

from __future__ import annotations

import torch
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

from slipstream.kernels.gpu.launching import launch_options
from slipstream.kernels.gpu.paged_decode import LOG2_E

# Triton 3.7 renamed it.
barrier = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier

HEAD_DIMS = (64, 128, 256)
CAPABILITY = (9, 0)
# Lines that one look-up in the page table serves.
RUN = 8


@gluon.jit
def _fetch(buffer, base, place, mask):
    """Start copying lines of K or V into a buffer, zeros where they are masked."""
    # Lost on the way through a reshape: lines are contiguous, and begin at multiples of 16 bytes.
    source = gl.max_contiguous(gl.multiple_of(base + place, [16, 16]), [1, 8])
    async_copy.async_copy_global_to_shared(buffer, source, mask=mask)


@gluon.jit
def _produce(
    k_buffers, v_buffers, k_full, v_full, k_free, v_free, k_base, v_offset, table_base, low, last,
    num_tiles, page_stride, token_stride,
    HEAD: gl.constexpr, PAGE: gl.constexpr, BLOCK_N: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Fill the buffers, tile by tile, as they become free."""
    lines: gl.constexpr = gl.BlockedLayout([8, 8], [256 // HEAD, HEAD // 8], [WARPS, 1], [1, 0])
    runs: gl.constexpr = gl.SliceLayout(
        2, gl.BlockedLayout([1, 8, 8], [256 // HEAD, 1, HEAD // 8], [WARPS, 1, 1], [2, 1, 0])
    )
    eight = 8 * gl.arange(0, BLOCK_N // 8, gl.SliceLayout(1, runs))
    within = gl.arange(0, 8, gl.SliceLayout(0, runs)) * token_stride
    n = gl.arange(0, BLOCK_N, gl.SliceLayout(1, lines))
    h = gl.arange(0, HEAD, gl.SliceLayout(0, lines))
    for j in range(num_tiles):
        run = low + j * BLOCK_N + eight
        page = gl.load(table_base + run // PAGE, mask=run < last, other=0).to(gl.int64)
        place = page * page_stride + (run % PAGE) * token_stride
        place = gl.reshape(place[:, None] + within[None, :], [BLOCK_N])
        place = gl.convert_layout(place, gl.SliceLayout(1, lines), assert_trivial=True)
        place = place[:, None] + h[None, :]
        mask = (low + j * BLOCK_N + n < last)[:, None] & (h[None, :] >= 0)
        slot, phase = j % 2, (j // 2) & 1
        mbarrier.wait(k_free.index(slot), phase ^ 1)
        _fetch(k_buffers.index(slot), k_base, place, mask)
        async_copy.mbarrier_arrive(k_full.index(slot), increment_count=False)
        mbarrier.wait(v_free.index(slot), phase ^ 1)
        _fetch(v_buffers.index(slot), k_base + v_offset, place, mask)
        async_copy.mbarrier_arrive(v_full.index(slot), increment_count=False)
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
def _release(free):
    """Say that this group has read a buffer: all of its warps have."""
    barrier()
    mbarrier.arrive(free)


@gluon.jit
def _consume(
    q_buffer, k_buffers, v_buffers, k_full, v_full, k_free, v_free, q_ptr, out_ptr, q_stride_t, out_stride_t,
    rows_left, first_position, low, last, scale_log2, cap_log2, window,
    HEAD: gl.constexpr, BLOCK_N: gl.constexpr, HAS_CAP: gl.constexpr, HAS_WINDOW: gl.constexpr,
):  # fmt: skip
    """Compute 64 queries, whose first one stands at `first_position`; `rows_left` of them are real."""
    lines: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HEAD, HEAD // 8], [4, 1], [1, 0])
    scored: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    summed: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, summed, 2)
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    m = gl.arange(0, 64, gl.SliceLayout(1, lines))
    h = gl.arange(0, HEAD, gl.SliceLayout(0, lines))
    is_query = (m < rows_left)[:, None] & (h[None, :] >= 0)
    q_buffer.store(gl.load(q_ptr + m[:, None] * q_stride_t + h[None, :], mask=is_query, other=0.0))
    fence_async_shared()
    barrier()

    # Of the program's tiles those that one of these queries sees; under a window all are masked.
    num_tiles = gl.cdiv(gl.minimum(last, first_position + 64) - low, BLOCK_N)
    num_whole = 0
    if not HAS_WINDOW:
        num_whole = (first_position + 1) // BLOCK_N
    key = gl.arange(0, BLOCK_N, gl.SliceLayout(0, scored))
    q_position = first_position + gl.arange(0, 64, gl.SliceLayout(1, scored))
    best = gl.full([64], -1e30, gl.float32, gl.SliceLayout(1, scored))
    total = gl.full([64], 0.0, gl.float32, gl.SliceLayout(1, scored))
    acc = gl.full([64, HEAD], 0.0, gl.float32, summed)
    nothing = gl.full([64, BLOCK_N], 0.0, gl.float32, scored)

    mbarrier.wait(k_full.index(0), 0)
    fence_async_shared()
    scores = warpgroup_mma(q_buffer, k_buffers.index(0).permute((1, 0)), nothing, use_acc=False)
    _release(k_free.index(0))
    weights, shrink, best, total = _weigh(
        scores, best, total, q_position, low, window, key, scale_log2, cap_log2, True, HAS_WINDOW, HAS_CAP
    )  # fmt: skip
    p = gl.convert_layout(weights.to(dtype), operand)
    for j in range(1, num_tiles):
        now, before = j % 2, (j - 1) % 2
        mbarrier.wait(k_full.index(now), (j // 2) & 1)
        fence_async_shared()
        scores_next = warpgroup_mma(
            q_buffer, k_buffers.index(now).permute((1, 0)), nothing, use_acc=False, is_async=True
        )
        mbarrier.wait(v_full.index(before), ((j - 1) // 2) & 1)
        fence_async_shared()
        sums = warpgroup_mma(p, v_buffers.index(before), acc, is_async=True)
        scores = warpgroup_mma_wait(1, deps=(scores_next,))
        _release(k_free.index(now))
        at = low + j * BLOCK_N
        if j < num_whole:
            weights, shrink, best, total = _weigh(
                scores, best, total, q_position, at, window, key, scale_log2, cap_log2, False, HAS_WINDOW,
                HAS_CAP,
            )  # fmt: skip
        else:
            weights, shrink, best, total = _weigh(
                scores, best, total, q_position, at, window, key, scale_log2, cap_log2, True, HAS_WINDOW,
                HAS_CAP,
            )  # fmt: skip
        acc = warpgroup_mma_wait(0, deps=(sums,))
        _release(v_free.index(before))
        p = gl.convert_layout(weights.to(dtype), operand)
        acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, summed))[:, None]
    final = num_tiles - 1
    mbarrier.wait(v_full.index(final % 2), (final // 2) & 1)
    fence_async_shared()
    acc = warpgroup_mma(p, v_buffers.index(final % 2), acc)
    out = acc / gl.convert_layout(gl.maximum(total, 1e-30), gl.SliceLayout(1, summed))[:, None]
    out = gl.convert_layout(out.to(dtype), lines)
    gl.store(out_ptr + m[:, None] * out_stride_t + h[None, :], out, mask=is_query)


@gluon.jit
def _hopper_prefill(
    q_ptr, kv_ptr, table_ptr, lens_ptr, start_ptr, tiles_ptr, out_ptr,
    q_stride_t, q_stride_n, page_stride, v_offset, token_stride, head_stride, table_stride,
    out_stride_t, out_stride_n, scale_log2, cap_log2, window,
    GROUP: gl.constexpr, HEAD: gl.constexpr, PAGE: gl.constexpr, BLOCK_N: gl.constexpr,
    HAS_CAP: gl.constexpr, HAS_WINDOW: gl.constexpr, PRODUCERS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    shared: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    head, tile = gl.program_id(0), gl.program_id(1)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = gl.load(tiles_ptr + 2 * tile).to(gl.int64)
    offset = gl.load(tiles_ptr + 2 * tile + 1).to(gl.int32)
    token = gl.load(start_ptr + row)
    count = (gl.load(start_ptr + row + 1) - token).to(gl.int32)
    length = gl.load(lens_ptr + row).to(gl.int32)
    # The plan's tiles are smaller than ours: of those that share one, the first has the work.
    if (offset >= count) | (offset % 128 != 0):
        return
    first_position = length - count + offset
    last = gl.minimum(length, first_position + 128)
    low = 0
    if HAS_WINDOW:
        # Look-ups are made for eight lines of a page at once.
        low = gl.maximum(0, first_position - window + 1) // 8 * 8
    num_tiles = gl.cdiv(last - low, BLOCK_N)

    q_buffers = gl.allocate_shared_memory(dtype, [2, 64, HEAD], shared)
    k_buffers = gl.allocate_shared_memory(dtype, [2, BLOCK_N, HEAD], shared)
    v_buffers = gl.allocate_shared_memory(dtype, [2, BLOCK_N, HEAD], shared)
    k_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    v_free = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        # Each thread that copies says when its copies are done; each group when it has read.
        mbarrier.init(k_full.index(i), count=32 * PRODUCERS)
        mbarrier.init(v_full.index(i), count=32 * PRODUCERS)
        mbarrier.init(k_free.index(i), count=2)
        mbarrier.init(v_free.index(i), count=2)
    barrier()

    k_base = kv_ptr + (head // GROUP) * head_stride
    table_base = table_ptr + row * table_stride
    line = token + offset
    q_base = q_ptr + line * q_stride_t + head * q_stride_n
    out_base = out_ptr + line * out_stride_t + head * out_stride_n
    gl.warp_specialize(
        [
            (_consume, (
                q_buffers.index(0), k_buffers, v_buffers, k_full, v_full, k_free, v_free, q_base, out_base,
                q_stride_t, out_stride_t, count - offset, first_position, low, last, scale_log2, cap_log2,
                window, HEAD, BLOCK_N, HAS_CAP, HAS_WINDOW,
            )),
            (_consume, (
                q_buffers.index(1), k_buffers, v_buffers, k_full, v_full, k_free, v_free,
                q_base + 64 * q_stride_t, out_base + 64 * out_stride_t, q_stride_t, out_stride_t,
                count - offset - 64, first_position + 64, low, last, scale_log2, cap_log2, window,
                HEAD, BLOCK_N, HAS_CAP, HAS_WINDOW,
            )),
            (_produce, (
                k_buffers, v_buffers, k_full, v_full, k_free, v_free, k_base, v_offset, table_base, low, last,
                num_tiles, page_stride, token_stride, HEAD, PAGE, BLOCK_N, PRODUCERS,
            )),
        ],
        [4, PRODUCERS],
        [224, 56],
    )  # fmt: skip


def serves(q_TNH: Tensor, kv_P2tKH: Tensor) -> bool:
    """Say whether the kernel can do this: 16 bits, a head size it knows, pages of whole look-ups, sm 9.0."""
    return (
        q_TNH.is_cuda
        and torch.cuda.get_device_capability(q_TNH.device) == CAPABILITY
        and q_TNH.dtype == kv_P2tKH.dtype
        and q_TNH.dtype in (torch.bfloat16, torch.float16)
        and q_TNH.shape[2] in HEAD_DIMS
        and kv_P2tKH.shape[2] % RUN == 0
    )


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
    **shape: int,
) -> None:
    """Attend and write `out_TNH`; see `kernels/paged_prefill.py`. Only enqueues.

    `shape` replaces `BLOCK_N` and the warps that fetch, `PRODUCERS`, to try others.
    """
    _, heads, size = q_TNH.shape
    _, _, page_tokens, kv_heads, _ = kv_P2tKH.shape
    if len(tiles_M2) == 0:
        return
    sizes = {"BLOCK_N": 64 if size > 128 else 128, "PRODUCERS": 4} | shape
    _hopper_prefill[(heads, len(tiles_M2))](
        q_TNH, kv_P2tKH, table_BC, seq_lens_B, query_start_B, tiles_M2, out_TNH,
        q_TNH.stride(0), q_TNH.stride(1), kv_P2tKH.stride(0), kv_P2tKH.stride(1), kv_P2tKH.stride(2),
        kv_P2tKH.stride(3), table_BC.stride(0), out_TNH.stride(0), out_TNH.stride(1),
        scale * LOG2_E, softcap * LOG2_E if softcap else 1.0, window,
        GROUP=heads // kv_heads, HEAD=size, PAGE=page_tokens, HAS_CAP=softcap > 0, HAS_WINDOW=window > 0,
        num_warps=4, **sizes, **launch_options(q_TNH),
    )  # fmt: skip
