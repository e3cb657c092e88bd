# pyright: reportMissingImports=false, reportIndexIssue=false
"""How do the rows of a step attend on a GPU when some are long and some short? In equal shares of all blocks.

A program works from its border to the next (`decode_borders.py`), over the end of one row and kv head into
the next. Where a border stands within, the parts are joined by whoever ends last; the parts that a shared
beginning gave (`shared_prefix_decode.py`) are joined to them.
Invariants: nothing behind `seq_lens`, before the window or in a shared beginning is read; a row of length 0
gives zeros; who made which part follows from the borders, so there is no list of parts.
Sources: Osama et al., Stream-K, arXiv 2301.03598; Ye et al., FlashInfer, arXiv 2501.01005 (one plan for
ragged rows, made on the host there).
R rows, N query heads, K kv heads, G = N / K, H head size, P programs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from slipstream.kernels.decode_shares import SHORTEST, keys_of_unit
from slipstream.kernels.gpu.launching import launch_options, start_next, wait_for_previous
from slipstream.kernels.gpu.paged_decode import (
    LOG2_E,
    add_parts,
    attend_share,
    lines_of,
    parts_at_once,
    store_joined,
)

# So that as many programs fit a multiprocessor as borders are made for (65,536 registers, 128 threads each).
MAX_REGISTERS = 128
# Blocks of keys on their way while one is worked on.
STAGES = 3
# Of a row's own parts; more at once would take registers from the blocks of keys.
PARTS_AT_ONCE = 4


class PrefixParts(NamedTuple):
    """What tiles over shared beginnings left behind: parts, and where those of each row stand.

    `rows_5R` holds, row by row, how many positions were shared (0: none), the first entry with a part of the
    row, how many there are, how many entries further the next one is, and the row's place among the
    `tile_rows` of an entry; an entry's part of a kv head has `lines` lines.
    """

    rows_5R: Tensor
    part: Tensor
    stats: Tensor
    lines: int


@triton.jit
def _first_border_from(unit, share, longer):
    """Return the first border at `unit` or behind it; the shares before border `longer` are a unit longer."""
    turn = longer * (share + 1)
    behind = longer + tl.cdiv(unit - turn, share)
    return tl.where(unit <= turn, tl.cdiv(unit, share + 1), behind)


@triton.jit
def _last_border_until(unit, share, longer):
    turn = longer * (share + 1)
    return tl.where(unit < turn, unit // (share + 1), longer + (unit - turn) // share)


@triton.jit
def _join(
    out_ptr, out_stride_n, part_ptr, stats_ptr, owner, used, kv_head, rows_ptr, rows_stride,
    prefix_part_ptr, prefix_stats_ptr, h, K: tl.constexpr, GROUP: tl.constexpr, HEAD: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_S: tl.constexpr, LINES: tl.constexpr, HAS_PREFIXES: tl.constexpr,
):  # fmt: skip
    """Join the parts that `used` programs from `owner` on left behind, and those of a shared beginning."""
    few: tl.constexpr = lines_of(GROUP)
    f, s = tl.arange(0, few), tl.arange(0, BLOCK_S)
    is_head = (f < GROUP)[None, :]
    acc = tl.zeros((few, BLOCK_H), tl.float32)
    best, total = tl.full((few,), -1e30, tl.float32), tl.zeros((few,), tl.float32)
    for first in range(0, used, BLOCK_S):
        i = first + s
        line = ((owner + i) * 2 + tl.where(i > 0, 1, 0)) * GROUP
        acc, best, total = add_parts(
            acc, best, total, part_ptr, stats_ptr, line[:, None] + f[None, :],
            (i < used)[:, None] & is_head, h, HEAD,
        )  # fmt: skip
    if HAS_PREFIXES:
        entry, count = tl.load(rows_ptr + rows_stride), tl.load(rows_ptr + 2 * rows_stride)
        step, place = tl.load(rows_ptr + 3 * rows_stride), tl.load(rows_ptr + 4 * rows_stride)
        for first in range(0, count, BLOCK_S):
            i = first + s
            line = ((entry + i * step) * K + kv_head) * LINES + place * GROUP
            acc, best, total = add_parts(
                acc, best, total, prefix_part_ptr, prefix_stats_ptr, line[:, None] + f[None, :],
                (i < count)[:, None] & is_head, h, HEAD,
            )  # fmt: skip
    store_joined(acc, total, out_ptr, out_stride_n, kv_head, h, GROUP, HEAD)


@triton.jit
def _finish(
    acc, best, total, out_ptr, out_stride_n, part_ptr, stats_ptr, counters_ptr, borders_ptr, program,
    programs, start, end, first_unit, kv_head, unread, rows_ptr, rows_stride, prefix_part_ptr,
    prefix_stats_ptr, K: tl.constexpr, GROUP: tl.constexpr, HEAD: tl.constexpr, SHORTEST: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_S: tl.constexpr, LINES: tl.constexpr,
    HAS_PREFIXES: tl.constexpr,
):  # fmt: skip
    """Write the output of a row and kv head, or leave a part of it behind and join if it is the last.

    The borders between [start, end) that did not move cut it: the program before the first of them made
    part 0, the next ones the others. A program has a line for what begins with it and one for what does not.
    """
    g, h = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_H)
    share = tl.load(borders_ptr + (programs + 1) * 4)
    longer = tl.load(borders_ptr + (programs + 1) * 4 + 1)
    border = _first_border_from(start + SHORTEST, share, longer)
    used = 1 + tl.maximum(_last_border_until(end - SHORTEST, share, longer) + 1 - border, 0)
    if (used == 1) & (unread == 0):
        store_joined(acc, total, out_ptr, out_stride_n, kv_head, h, GROUP, HEAD)
    else:
        line = (program * 2 + tl.where(first_unit == start, 0, 1)) * GROUP + g
        is_head = (g[:, None] < GROUP) & (h[None, :] < HEAD)
        tl.store(part_ptr + line[:, None] * HEAD + h[None, :], acc, mask=is_head)
        tl.store(stats_ptr + line * 2, best, mask=g < GROUP)
        tl.store(stats_ptr + line * 2 + 1, total, mask=g < GROUP)
        # All lanes have stored before one of them says so, or before this program reads it itself.
        tl.debug_barrier()
        owner, before = program, 0
        if used > 1:
            owner = border - 1
            before = tl.atomic_add(counters_ptr + border, 1, sem="acq_rel")
        if before == used - 1:
            _join(
                out_ptr, out_stride_n, part_ptr, stats_ptr, owner, used, kv_head, rows_ptr, rows_stride,
                prefix_part_ptr, prefix_stats_ptr, h, K, GROUP, HEAD, BLOCK_H, BLOCK_S, LINES, HAS_PREFIXES,
            )  # fmt: skip
            if used > 1:
                tl.store(counters_ptr + border, 0)
        # The line may be written again for the next one.
        tl.debug_barrier()


@triton.jit(
    do_not_specialize=["num_rows", "window", "table_stride", "rows_stride"],
    do_not_specialize_on_alignment=["lens_ptr", "rows_ptr", "table_ptr"],
)
def _balanced(
    q_ptr, kv_ptr, table_ptr, lens_ptr, borders_ptr, out_ptr, part_ptr, stats_ptr, counters_ptr, rows_ptr,
    prefix_part_ptr, prefix_stats_ptr, q_stride_r, q_stride_n, page_stride, v_offset, token_stride,
    head_stride, table_stride, out_stride_r, out_stride_n, rows_stride, scale_log2, cap_log2, window,
    num_rows, K: tl.constexpr, GROUP: tl.constexpr, HEAD: tl.constexpr, PAGE: tl.constexpr,
    LINES: tl.constexpr, SHORTEST: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_S: tl.constexpr, HAS_PREFIXES: tl.constexpr, HAS_CAP: tl.constexpr,
    IS_EXACT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    program, programs = tl.program_id(0), tl.num_programs(0)
    start_next(PDL)
    wait_for_previous(PDL)
    low_unit = tl.load(borders_ptr + program * 4)
    at = tl.load(borders_ptr + program * 4 + 1)
    start = tl.load(borders_ptr + program * 4 + 2)
    length = tl.load(borders_ptr + program * 4 + 3)
    high_unit = tl.load(borders_ptr + program * 4 + 4)
    nobodys = tl.load(lens_ptr + program, mask=program < num_rows, other=1).to(tl.int32)
    g, h = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_H)
    is_head = (g[:, None] < GROUP) & (h[None, :] < HEAD)
    while start < high_unit:
        row, kv_head = at // K, at % K
        # On its way while this one is worked on.
        next_row = tl.minimum((at + 1) // K, num_rows - 1)
        next_length = tl.load(lens_ptr + next_row).to(tl.int32)
        unread = tl.zeros_like(length)
        if HAS_PREFIXES:
            unread = tl.minimum(tl.load(rows_ptr + row), length)
        first = unread
        if window > 0:
            first = tl.maximum(first, length - window)
        end = start + tl.cdiv(length - first, BLOCK_N)
        first_unit, end_unit = tl.maximum(start, low_unit), tl.minimum(end, high_unit)
        if first_unit < end_unit:
            heads = kv_head * GROUP + g
            at_q = q_ptr + row * q_stride_r + heads[:, None] * q_stride_n + h[None, :]
            acc, best, total = attend_share(
                tl.load(at_q, mask=is_head, other=0.0), kv_ptr + kv_head * head_stride,
                table_ptr + row * table_stride, first + (first_unit - start) * BLOCK_N,
                tl.minimum(length, first + (end_unit - start) * BLOCK_N), page_stride, v_offset,
                token_stride, scale_log2, cap_log2,
                HEAD, PAGE, BLOCK_G, BLOCK_N, BLOCK_H, HAS_CAP, IS_EXACT,
            )  # fmt: skip
            _finish(
                acc, best, total, out_ptr + row * out_stride_r, out_stride_n, part_ptr, stats_ptr,
                counters_ptr, borders_ptr, program, programs, start, end, first_unit, kv_head, unread,
                rows_ptr + row, rows_stride, prefix_part_ptr, prefix_stats_ptr,
                K, GROUP, HEAD, SHORTEST, BLOCK_G, BLOCK_H, BLOCK_S, LINES, HAS_PREFIXES,
            )  # fmt: skip
        start = end
        length = next_length
        at += 1
    # Rows of nobody have no units; their zeros are dealt out like cards.
    for row in range(program, num_rows, programs):
        if nobodys == 0:
            nothing, none = tl.zeros((BLOCK_G, BLOCK_H), tl.float32), tl.zeros((BLOCK_G,), tl.float32)
            at_row = out_ptr + row * out_stride_r
            for kv_head in range(K):
                store_joined(nothing, none, at_row, out_stride_n, kv_head, h, GROUP, HEAD)
        nobodys = tl.load(lens_ptr + row + programs, mask=row + programs < num_rows, other=1).to(tl.int32)


def balanced_decode(
    q_RNH: Tensor,
    kv_P2tKH: Tensor,
    table_RC: Tensor,
    seq_lens_R: Tensor,
    borders: Tensor,
    out_RNH: Tensor,
    counters: Tensor,
    scale: float,
    window: int,
    softcap: float,
    *,
    prefixes: PrefixParts | None = None,
) -> None:
    """Attend and write `out_RNH`; see `kernels/balanced_decode.py`. Only enqueues.

    With `prefixes`, the shared positions are not read: what they gave is joined. Borders are made for them.
    """
    rows, heads, size = q_RNH.shape
    _, _, page_tokens, kv_heads, _ = kv_P2tKH.shape
    if rows == 0:
        return
    programs, group = len(borders) - 2, heads // kv_heads
    assert programs < len(counters), "a counter for each border"
    part, stats = make_lines(2 * programs * group, size, q_RNH.device)
    found = prefixes or PrefixParts(borders, part, stats, 1)
    parts = parts_at_once(group, size)
    if prefixes is None:
        parts = min(parts, PARTS_AT_ONCE)
    is_exact, block_h = q_RNH.dtype == torch.float32, max(16, triton.next_power_of_2(size))
    _balanced[(programs,)](
        q_RNH, kv_P2tKH, table_RC, seq_lens_R, borders, out_RNH, part, stats, counters, found.rows_5R,
        found.part, found.stats, q_RNH.stride(0), q_RNH.stride(1), kv_P2tKH.stride(0), kv_P2tKH.stride(1),
        kv_P2tKH.stride(2), kv_P2tKH.stride(3), table_RC.stride(0), out_RNH.stride(0), out_RNH.stride(1),
        found.rows_5R.stride(0), scale * LOG2_E, softcap * LOG2_E if softcap else 1.0, window, rows,
        K=kv_heads, GROUP=group, HEAD=size, PAGE=page_tokens, LINES=found.lines, SHORTEST=SHORTEST,
        BLOCK_G=max(16, triton.next_power_of_2(group)), BLOCK_N=keys_of_unit(q_RNH.dtype, size),
        BLOCK_H=block_h, BLOCK_S=parts, HAS_PREFIXES=prefixes is not None,
        HAS_CAP=softcap > 0, IS_EXACT=is_exact, num_warps=4, num_stages=2 if is_exact else STAGES,
        maxnreg=MAX_REGISTERS, **launch_options(q_RNH),
    )  # fmt: skip


def make_lines(lines: int, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return memory for parts: sums of values, and maxima and sums of weights."""
    part = torch.empty(lines, size, dtype=torch.float32, device=device)
    return part, torch.empty(lines, 2, dtype=torch.float32, device=device)
