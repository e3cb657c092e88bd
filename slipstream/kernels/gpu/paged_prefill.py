# pyright: reportMissingImports=false, reportIndexIssue=false
"""How do the queries of a span attend to its pages on a GPU? Tiles of queries, on tensor cores.

A program walks over the keys that its queries can see and keeps a running softmax. Tiles of keys that every
query sees need no mask and come first; the last ones hold the diagonal. With enough tiles for the whole GPU a
program takes a tile of one head. With fewer, it takes a few queries of all heads that share keys, and one
share of the context; shares are kept in float32, and whoever ends last joins them in their order.
Of a tree of drafts the tiles that hold the span itself are masked by its bits (`tree_masks.py`); the context
before it is walked as any other.
Invariant: nothing behind a row's length or before the tile's first window is read; how a context is cut
depends on the number of tiles and the true length, not on a bound, so that a captured step computes the same.
Source: Dao, FlashAttention-2, arXiv 2307.08691; shares as in Dao et al., Flash-Decoding for long-context
inference (2023); pages as in Kwon et al., PagedAttention, arXiv 2309.06180.
T tokens, N query heads, K kv heads, H head size, P pages, t tokens of a block, B rows, M tiles of the plan.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from slipstream.kernels.gpu.launching import launch_options, sms_of, start_next, wait_for_previous
from slipstream.kernels.gpu.paged_decode import LOG2_E, capped_scores
from slipstream.kernels.gpu.tree_masks import keep_apart, place_queries, sees
from slipstream.kernels.query_tiles import tile_queries
from slipstream.kernels.tree_masks import MAX_TREE_TOKENS

logger = logging.getLogger(__name__)

# The most shares worth joining, and the most heads whose queries one program takes together.
MAX_SHARES = 32
MAX_PACK = 16
# Fewer tiles of a step are cut by heads and context at once, which Hopper's own kernel does not.
MANY_TILES = 3
# What a program may take of a multiprocessor's memory where deep queues run, as on an A100 or an H100.
DEEP_BYTES = 160 << 10


@dataclasses.dataclass(frozen=True, slots=True)
class Cut:
    """How few queries over a long context are cut: lines (query and head) and keys of a tile, how it runs.

    `per_sm` programs are to be on a multiprocessor; a share has at least `shortest` keys. Many queries are
    not shared out: then a program has the queries of a tile, of as many heads as make the lines.
    """

    lines: int
    keys: int
    warps: int
    stages: int
    per_sm: int
    shortest: int


# Five stages: keys are asked for two tiles ahead of their product, and their pages two tiles before. With
# fewer, both are awaited as soon as they are asked for.
CUT = Cut(lines=64, keys=64, warps=4, stages=5, per_sm=2, shortest=512)
WHOLE = Cut(lines=64, keys=64, warps=4, stages=5, per_sm=1, shortest=1)
# In float32, whose products take four times as long.
EXACT_CUT = Cut(lines=32, keys=32, warps=4, stages=1, per_sm=4, shortest=128)
EXACT_WHOLE = Cut(lines=32, keys=32, warps=4, stages=1, per_sm=1, shortest=1)


class Launch(NamedTuple):
    """One launch: heads and queries of a program, programs that a tile of the plan takes, shares.

    `wanted` is how many shares a long context has, `shares` how many the longest one here can have.
    """

    cut: Cut
    pack: int
    queries: int
    subs: int
    wanted: int
    shares: int


@triton.jit
def _visit(
    acc, best, total, q, q_position, kv_base, v_offset, table_base, at, last,
    page_stride, token_stride, scale_log2, cap_log2, window, n, h,
    span_start, q_low, q_high, q_place,
    HEAD: tl.constexpr, PAGE: tl.constexpr, HAS_CAP: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HAS_TREE: tl.constexpr, IS_DIAGONAL: tl.constexpr, IS_EXACT: tl.constexpr, IS_PADDED: tl.constexpr,
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
    if IS_DIAGONAL and HAS_TREE:
        is_seen = sees(q_low, q_high, q_position, span_start, position, last)
        scores = tl.where(is_seen, scores, float("-inf"))
    elif IS_DIAGONAL:
        scores = tl.where(position[None, :] <= q_position[:, None], scores, float("-inf"))
    if HAS_WINDOW:
        # A draft's slot lies no earlier than its place: what a window leaves of the tree, the bits say.
        scores = tl.where(position[None, :] > q_place[:, None] - window, scores, float("-inf"))
    # Not -inf: a query of this tile may see nothing of the first tiles of keys.
    larger = tl.maximum(tl.maximum(best, tl.max(scores, 1)), -1e30)
    weights = tl.exp2(scores - larger[:, None])
    shrink = tl.exp2(best - larger)
    if IS_DIAGONAL and HAS_TREE:
        weights, v = keep_apart(scores, weights, v)
    total = total * shrink + tl.sum(weights, 1)
    acc = acc * shrink[:, None]
    if IS_EXACT:
        acc += tl.dot(weights, v, input_precision="ieee")
    else:
        acc = tl.dot(weights.to(v.dtype), v, acc)
    return acc, larger, total


@triton.jit
def _join(part_ptr, stats_ptr, first, used, m, h, BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr):
    """Join the shares of a tile in their order. Past the L1, which misses other programs' stores."""
    best = tl.full((BLOCK_M,), -1e30, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_H), tl.float32)
    place = m[:, None] * BLOCK_H + h[None, :]
    # Staged, or each share would wait for the one before it to arrive.
    for share in tl.range(first, first + used, num_stages=3):
        at = stats_ptr + share * 2 * BLOCK_M + m
        own_best = tl.load(at, cache_modifier=".cg")
        own_total = tl.load(at + BLOCK_M, cache_modifier=".cg")
        part = tl.load(part_ptr + share * BLOCK_M * BLOCK_H + place, cache_modifier=".cg")
        larger = tl.maximum(best, own_best)
        shrink, weight = tl.exp2(best - larger), tl.exp2(own_best - larger)
        acc = acc * shrink[:, None] + part * weight[:, None]
        total = total * shrink + own_total * weight
        best = larger
    return acc, total


@triton.jit
def _write(acc, total, at_out, is_query):
    out = acc / tl.maximum(total, 1e-30)[:, None]
    tl.store(at_out, out.to(at_out.dtype.element_ty), mask=is_query)


@triton.jit
def _hand_in(
    acc, best, total, at_out, is_query, part_ptr, stats_ptr, counters_ptr, used, unit, m, h,
    BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Keep one share of a tile; whoever brings the last of `used` joins and writes them."""
    group = unit * tl.num_programs(1) + tl.program_id(1)
    first = group.to(tl.int64) * tl.num_programs(2)
    line = first + tl.program_id(2)
    tl.store(part_ptr + line * BLOCK_M * BLOCK_H + m[:, None] * BLOCK_H + h[None, :], acc)
    tl.store(stats_ptr + line * 2 * BLOCK_M + m, best)
    tl.store(stats_ptr + (line * 2 + 1) * BLOCK_M + m, total)
    # All lanes have stored before one of them says so.
    tl.debug_barrier()
    if tl.atomic_add(counters_ptr + group, 1, sem="acq_rel") == used - 1:
        acc, total = _join(part_ptr, stats_ptr, first, used, m, h, BLOCK_M, BLOCK_H)
        _write(acc, total, at_out, is_query)
        tl.store(counters_ptr + group, 0)


@triton.jit(
    do_not_specialize=["table_stride", "subs", "wanted"],
    do_not_specialize_on_alignment=["table_ptr", "lens_ptr", "start_ptr", "tiles_ptr", "tree_ptr"],
)
def _prefill(
    q_ptr, kv_ptr, table_ptr, lens_ptr, start_ptr, tiles_ptr, out_ptr, part_ptr, stats_ptr, counters_ptr,
    tree_ptr, q_stride_t, q_stride_n, page_stride, v_offset, token_stride, head_stride, table_stride,
    out_stride_t, out_stride_n, scale_log2, cap_log2, window, subs, wanted,
    GROUP: tl.constexpr, HEAD: tl.constexpr, PAGE: tl.constexpr, TILE: tl.constexpr, QUERIES: tl.constexpr,
    PACK: tl.constexpr, SHORTEST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr, HAS_CAP: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SHARES: tl.constexpr,
    HAS_TREE: tl.constexpr, IS_FIXED: tl.constexpr, IS_EXACT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    unit, head = tl.program_id(0), tl.program_id(1) * PACK
    start_next(PDL)
    wait_for_previous(PDL)
    tile, sub = unit // subs, unit % subs
    row = tl.load(tiles_ptr + 2 * tile).to(tl.int64)
    tile_offset = tl.load(tiles_ptr + 2 * tile + 1).to(tl.int32)
    token = tl.load(start_ptr + row)
    count = (tl.load(start_ptr + row + 1) - token).to(tl.int32)
    length = tl.load(lens_ptr + row).to(tl.int32)
    offset = tile_offset + sub * QUERIES
    # A captured step has tiles for its longest span; there is nothing to do behind a shorter one.
    if offset >= count:
        return
    m, n, h = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_H)
    query = m // PACK
    is_own = (query < QUERIES) & (offset + query < tl.minimum(count, tile_offset + TILE))
    is_query = is_own[:, None] & (h[None, :] < HEAD)
    q_line, q_head = (token + offset + query)[:, None], (head + m % PACK)[:, None]
    q = tl.load(q_ptr + q_line * q_stride_t + q_head * q_stride_n + h[None, :], mask=is_query, other=0.0)
    span_start = length - count
    first_position = span_start + offset
    q_position = first_position + query
    last = tl.minimum(length, first_position + QUERIES)
    # Where queries stand, as windows count, the first of them, and up to where the whole tile sees all keys.
    q_place, first_place, common = q_position, first_position, first_position + 1
    q_low, q_high = query, query
    if HAS_TREE:
        q_bits = tl.load(tree_ptr + token + offset + query, mask=is_own, other=0)
        q_low, q_high, q_place = place_queries(q_bits, q_position, span_start, window, HAS_WINDOW)
        first_place = tl.min(tl.where(is_own, q_place, last))
        common = tl.where(tl.load(tree_ptr + token) != 0, span_start, common)
    low = 0
    if HAS_WINDOW:
        low = tl.maximum(0, first_place - window + 1)
    # No mask for those; bits may differ from those under one.
    whole = low if IS_FIXED else low + tl.maximum(common - low, 0) // BLOCK_N * BLOCK_N
    used = 1
    if HAS_SHARES:
        pieces = tl.minimum(wanted, tl.maximum((last - low) // SHORTEST, 1))
        share = tl.cdiv(tl.cdiv(last - low, pieces), BLOCK_N) * BLOCK_N
        used = tl.cdiv(last - low, share)
        low += tl.program_id(2) * share
        if low >= last:
            return
        last = tl.minimum(last, low + share)
        whole = tl.maximum(low, tl.minimum(whole, last))
    best = tl.full((BLOCK_M,), -1e30, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_H), tl.float32)
    kv_base = kv_ptr + (head // GROUP) * head_stride
    table_base = table_ptr + row * table_stride
    for at in range(low, whole, BLOCK_N):
        acc, best, total = _visit(
            acc, best, total, q, q_position, kv_base, v_offset, table_base, at, last,
            page_stride, token_stride, scale_log2, cap_log2, window, n, h, span_start, q_low, q_high, q_place,
            HEAD, PAGE, HAS_CAP, HAS_WINDOW, HAS_TREE, False, IS_EXACT, HEAD != BLOCK_H,
        )  # fmt: skip
    for at in range(whole, last, BLOCK_N):
        acc, best, total = _visit(
            acc, best, total, q, q_position, kv_base, v_offset, table_base, at, last,
            page_stride, token_stride, scale_log2, cap_log2, window, n, h, span_start, q_low, q_high, q_place,
            HEAD, PAGE, HAS_CAP, HAS_WINDOW, HAS_TREE, True, IS_EXACT, HEAD != BLOCK_H,
        )  # fmt: skip
    at_out = out_ptr + q_line * out_stride_t + q_head * out_stride_n + h[None, :]
    if used == 1:
        _write(acc, total, at_out, is_query)
    else:
        _hand_in(
            acc, best, total, at_out, is_query, part_ptr, stats_ptr, counters_ptr, used, unit, m, h,
            BLOCK_M, BLOCK_H,
        )  # fmt: skip


def _ceil(number: int, step: int) -> int:
    return -(-number // step)


@functools.cache
def _has_room(device_index: int) -> bool:
    return torch.cuda.get_device_properties(device_index).shared_memory_per_block_optin >= DEEP_BYTES


def _fitted(cut: Cut, q_TNH: Tensor) -> Cut:
    """Return a way that a GPU of less memory has room for, and long heads their sums in registers."""
    if q_TNH.shape[2] > 128 and q_TNH.dtype != torch.float32:
        cut = dataclasses.replace(cut, keys=32, warps=8, per_sm=1)
    if q_TNH.is_cuda and not _has_room(q_TNH.device.index):
        cut = dataclasses.replace(cut, stages=min(cut.stages, 2))
    return cut


def choose_shares(units: int, bound: int, cut: Cut, *, sms: int) -> tuple[int, int]:
    """Return how many shares a long context is to have, and how many one of at most `bound` keys can have.

    `units` are the programs of one share. A power of two, so that a step that is padded to some tiles more is
    cut as the step itself is; the second number alone depends on the bound, and changes no result.
    """
    wanted = max(1, min(MAX_SHARES, sms * cut.per_sm // max(1, units)))
    wanted = 1 << (wanted.bit_length() - 1)
    return wanted, max(1, min(wanted, bound // cut.shortest))


def choose_launch(
    q_TNH: Tensor, num_tiles: int, group: int, bound: int, cut: Cut | None, *, may_cut: bool
) -> Launch:
    """Return how a step of so many tiles runs; a function of host bounds alone. `bound` is in keys."""
    tokens, heads, _ = q_TNH.shape
    is_exact, tile = q_TNH.dtype == torch.float32, tile_queries(q_TNH.dtype)
    if may_cut:
        shared = cut or _fitted(EXACT_CUT if is_exact else CUT, q_TNH)
        pack = next(n for n in range(min(group, MAX_PACK), 0, -1) if group % n == 0)
        queries = _ceil(tile, _ceil(tile, shared.lines // pack))
        subs = _ceil(min(tile, tokens), queries)
        # A tile that is not full adds one program at most to those its queries fill.
        units = min(num_tiles * subs, num_tiles + (tokens - 1) // queries) * (heads // pack)
        wanted, shares = choose_shares(units, bound, shared, sms=sms_of(q_TNH))
        if wanted > 1:
            return Launch(shared, pack, queries, subs, wanted, shares)
    whole = cut or _fitted(EXACT_WHOLE if is_exact else WHOLE, q_TNH)
    pack = max(1, whole.lines // tile)
    if group % pack or whole.lines < tile:
        pack, whole = 1, dataclasses.replace(whole, lines=tile)
    return Launch(whole, pack, tile, 1, 1, 1)


def has_full_tiles(q_TNH: Tensor, tiles_M2: Tensor) -> bool:
    """Say whether tiles are at least half full and many enough for a kernel that takes two at once."""
    num_tiles = len(tiles_M2)
    return num_tiles >= MANY_TILES and len(q_TNH) * 2 >= num_tiles * tile_queries(q_TNH.dtype)


@functools.cache
def faster_kernel() -> Any:
    """Return the module of Hopper's own kernel, or None where this triton is too old or too new for it."""
    try:
        from slipstream.kernels.gpu import hopper_prefill
    except (ImportError, AttributeError) as error:
        logger.warning("prompts attend by the general kernel: triton %s has %s", triton.__version__, error)
        return None
    return hopper_prefill


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
    counters: Tensor | None = None,
    tree_T: Tensor | None = None,
    cut: Cut | None = None,
) -> None:
    """Attend and write `out_TNH`; see `kernels/paged_prefill.py`. Only enqueues. `cut` is for tuning."""
    _, heads, size = q_TNH.shape
    _, _, page_tokens, kv_heads, _ = kv_P2tKH.shape
    if len(tiles_M2) == 0:
        return
    bound = table_BC.shape[1] * page_tokens
    # Drafts stand no further apart than the slots of a tree.
    widest = tile_queries(q_TNH.dtype) if tree_T is None else MAX_TREE_TOKENS
    bound = min(bound, window + widest) if window else bound
    is_plain = counters is not None and cut is None and tree_T is None
    faster = faster_kernel() if is_plain and has_full_tiles(q_TNH, tiles_M2) else None
    if faster is not None and faster.serves(q_TNH, kv_P2tKH):
        places = (table_BC, seq_lens_B, query_start_B, tiles_M2)
        faster.hopper_prefill(q_TNH, kv_P2tKH, *places, out_TNH, scale, window, softcap)
        return
    way = choose_launch(q_TNH, len(tiles_M2), heads // kv_heads, bound, cut, may_cut=counters is not None)
    cut, block_h = way.cut, max(16, 1 << (size - 1).bit_length())
    grid = (len(tiles_M2) * way.subs, heads // way.pack, way.shares)
    part = stats = zeros = q_TNH
    if way.shares > 1 and counters is not None:
        assert grid[0] * grid[1] <= len(counters), "a counter for what is joined"
        lines, zeros = math.prod(grid) * cut.lines, counters
        part = torch.empty(lines, block_h, dtype=torch.float32, device=q_TNH.device)
        stats = torch.empty(lines, 2, dtype=torch.float32, device=q_TNH.device)
    _prefill[grid](
        q_TNH, kv_P2tKH, table_BC, seq_lens_B, query_start_B, tiles_M2, out_TNH, part, stats, zeros,
        q_TNH if tree_T is None else tree_T,
        q_TNH.stride(0), q_TNH.stride(1), kv_P2tKH.stride(0), kv_P2tKH.stride(1), kv_P2tKH.stride(2),
        kv_P2tKH.stride(3), table_BC.stride(0), out_TNH.stride(0), out_TNH.stride(1),
        scale * LOG2_E, softcap * LOG2_E if softcap else 1.0, window, way.subs, way.wanted,
        GROUP=heads // kv_heads, HEAD=size, PAGE=page_tokens, TILE=tile_queries(q_TNH.dtype),
        QUERIES=way.queries, PACK=way.pack, SHORTEST=cut.shortest, BLOCK_M=cut.lines, BLOCK_N=cut.keys,
        BLOCK_H=block_h, HAS_CAP=softcap > 0, HAS_WINDOW=window > 0, HAS_SHARES=way.shares > 1,
        HAS_TREE=tree_T is not None, IS_FIXED=counters is None, IS_EXACT=q_TNH.dtype == torch.float32,
        num_warps=cut.warps, num_stages=cut.stages, **launch_options(q_TNH),
    )  # fmt: skip
