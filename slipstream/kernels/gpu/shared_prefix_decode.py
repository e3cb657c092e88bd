# pyright: reportMissingImports=false, reportIndexIssue=false
"""How do rows that begin with the same pages attend to them on a GPU? Many rows to a tensor core product.

A program takes an entry and a kv head: the queries of some rows, all heads that use the kv head, are the 64
lines of one product over a chunk of the shared keys, which are so read once for all of them. It leaves parts
behind, one line for each row and head, that `balanced_decode.py` joins with what the rows have of their own.
Invariant: of shared positions only the first row's table is read, and nothing of the rows' own.
Source: Juravsky et al., Hydragen, arXiv 2402.05099.
R rows, N query heads, K kv heads, G = N / K, H head size, E entries.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from slipstream.kernels.decode_shares import keys_of_unit
from slipstream.kernels.gpu.balanced_decode import PrefixParts, balanced_decode, make_lines
from slipstream.kernels.gpu.launching import launch_options, start_next, wait_for_previous
from slipstream.kernels.gpu.paged_decode import LOG2_E, attend_share
from slipstream.kernels.shared_prefix import TILE_LINES, num_programs

LINES_OF_WARP = 16

# Keys' pages are looked up two blocks ahead of them, and keys asked for two blocks ahead of their product.
STAGES = 5


@triton.jit(
    do_not_specialize=["table_stride"],
    do_not_specialize_on_alignment=["table_ptr", "count_ptr", "entries_ptr", "members_ptr"],
)
def _attend_entries(
    q_ptr, kv_ptr, table_ptr, count_ptr, entries_ptr, members_ptr, part_ptr, stats_ptr, q_stride_r,
    q_stride_n, page_stride, v_offset, token_stride, head_stride, table_stride, entry_stride, scale_log2,
    cap_log2, K: tl.constexpr, GROUP: tl.constexpr, HEAD: tl.constexpr, PAGE: tl.constexpr,
    LINES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, HAS_CAP: tl.constexpr,
    IS_EXACT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    start_next(PDL)
    wait_for_previous(PDL)
    m, h = tl.arange(0, LINES), tl.arange(0, BLOCK_H)
    count = tl.load(count_ptr) * K
    for item in range(tl.program_id(0), count, tl.num_programs(0)):
        kv_head = item % K
        entry = entries_ptr + item // K * entry_stride
        is_query = m // GROUP < tl.load(entry + 1)
        row = tl.load(members_ptr + tl.load(entry) + m // GROUP, mask=is_query, other=0)
        at_q = row * q_stride_r + (kv_head * GROUP + m % GROUP) * q_stride_n
        is_value = is_query[:, None] & (h < HEAD)[None, :]
        acc, best, total = attend_share(
            tl.load(q_ptr + at_q[:, None] + h[None, :], mask=is_value, other=0.0),
            kv_ptr + kv_head * head_stride, table_ptr + tl.load(entry + 2) * table_stride,
            tl.load(entry + 3), tl.load(entry + 4), page_stride, v_offset, token_stride, scale_log2, cap_log2,
            HEAD, PAGE, LINES, BLOCK_N, BLOCK_H, HAS_CAP, IS_EXACT,
        )  # fmt: skip
        line = item * LINES + m
        tl.store(part_ptr + line[:, None] * HEAD + h[None, :], acc, mask=is_value)
        tl.store(stats_ptr + line * 2, best, mask=is_query)
        tl.store(stats_ptr + line * 2 + 1, total, mask=is_query)


def shared_prefix_decode(
    q_RNH: Tensor,
    kv_P2tKH: Tensor,
    table_RC: Tensor,
    seq_lens_R: Tensor,
    borders: Tensor,
    count_1: Tensor,
    entries_E5: Tensor,
    members_R: Tensor,
    rows_5R: Tensor,
    out_RNH: Tensor,
    counters: Tensor,
    scale: float,
    softcap: float,
) -> None:
    """Attend and write `out_RNH`; see `kernels/shared_prefix_decode.py`. Only enqueues."""
    _, heads, size = q_RNH.shape
    _, _, page_tokens, kv_heads, _ = kv_P2tKH.shape
    pieces = len(entries_E5) * kv_heads
    part, stats = make_lines(pieces * TILE_LINES, size, q_RNH.device)
    is_exact = q_RNH.dtype == torch.float32
    _attend_entries[(min(pieces, num_programs(q_RNH.device)),)](
        q_RNH, kv_P2tKH, table_RC, count_1, entries_E5, members_R, part, stats, q_RNH.stride(0),
        q_RNH.stride(1), kv_P2tKH.stride(0), kv_P2tKH.stride(1), kv_P2tKH.stride(2), kv_P2tKH.stride(3),
        table_RC.stride(0), entries_E5.stride(0), scale * LOG2_E, softcap * LOG2_E if softcap else 1.0,
        K=kv_heads, GROUP=heads // kv_heads, HEAD=size, PAGE=page_tokens, LINES=TILE_LINES,
        BLOCK_N=16 if is_exact else keys_of_unit(q_RNH.dtype, size),
        BLOCK_H=max(16, triton.next_power_of_2(size)), HAS_CAP=softcap > 0, IS_EXACT=is_exact,
        num_warps=8 if is_exact else TILE_LINES // LINES_OF_WARP, num_stages=1 if is_exact else STAGES,
        **launch_options(q_RNH),
    )  # fmt: skip
    balanced_decode(
        q_RNH, kv_P2tKH, table_RC, seq_lens_R, borders, out_RNH, counters, scale, 0, softcap,
        prefixes=PrefixParts(rows_5R, part, stats, TILE_LINES),
    )  # fmt: skip
