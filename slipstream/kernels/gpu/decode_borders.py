# pyright: reportMissingImports=false, reportIndexIssue=false
"""How does a GPU find where the work of a step of one-token rows is cut? Each program some borders.

Invariant: number by number what `kernels/decode_borders.py` computes; every program adds up all rows.
R rows, K kv heads, P programs, B borders of a program here.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from slipstream.kernels.decode_shares import SHORTEST
from slipstream.kernels.gpu.launching import launch_options, start_next, wait_for_previous

MIN_ROWS = 64
BORDERS = 16


@triton.jit(
    do_not_specialize=["num_rows", "window"],
    do_not_specialize_on_alignment=["lens_ptr", "unread_ptr"],
)
def _cut(
    lens_ptr, unread_ptr, out_ptr, num_rows, window, K: tl.constexpr, KEYS: tl.constexpr,
    PROGRAMS: tl.constexpr, SHORTEST: tl.constexpr, HAS_UNREAD: tl.constexpr, BLOCK_R: tl.constexpr,
    BORDERS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    start_next(PDL)
    wait_for_previous(PDL)
    r, b = tl.arange(0, BLOCK_R), tl.program_id(0) * BORDERS + tl.arange(0, BORDERS)
    lens = tl.load(lens_ptr + r, mask=r < num_rows, other=0).to(tl.int32)
    first = tl.zeros((BLOCK_R,), tl.int32)
    if HAS_UNREAD:
        first = tl.minimum(tl.load(unread_ptr + r, mask=r < num_rows, other=0), lens)
    if window > 0:
        first = tl.maximum(first, lens - window)
    units = tl.cdiv(lens - first, KEYS)
    ends = tl.cumsum(units, 0) * K
    total = tl.sum(units, 0) * K
    shares = tl.minimum(tl.maximum(total // SHORTEST, 1), PROGRAMS)
    share, longer = total // shares, total % shares
    unit = tl.minimum(b * share + tl.minimum(b, longer), total)
    # Lines behind the last row end where it does, and belong to none.
    is_before = (ends[:, None] <= unit[None, :]) & (r < num_rows)[:, None]
    row = tl.sum(is_before.to(tl.int32), 0)
    start = tl.sum(tl.where(is_before, units[:, None], 0), 0) * K
    own = tl.maximum(tl.sum(tl.where(r[:, None] == row[None, :], units[:, None], 0), 0), 1)
    offset = (unit - start) % own
    nearest = tl.where(offset * 2 <= own, 0, own)
    moved = tl.where(tl.minimum(offset, own - offset) < SHORTEST, nearest, offset)
    begin = unit - offset
    line = out_ptr + b * 4
    is_border = b <= PROGRAMS
    tl.store(line, begin + moved, mask=is_border)
    tl.store(line + 1, row * K + (unit - start) // own, mask=is_border)
    tl.store(line + 2, begin, mask=is_border)
    is_row = r[:, None] == row[None, :]
    tl.store(line + 3, tl.sum(tl.where(is_row, lens[:, None], 0), 0), mask=is_border)
    if tl.program_id(0) == 0:
        tl.store(out_ptr + (PROGRAMS + 1) * 4, share)
        tl.store(out_ptr + (PROGRAMS + 1) * 4 + 1, longer)
        tl.store(out_ptr + (PROGRAMS + 1) * 4 + 2, share * 0)
        tl.store(out_ptr + (PROGRAMS + 1) * 4 + 3, share * 0)


def decode_borders(
    seq_lens_R: Tensor, unread_R: Tensor | None, kv_heads: int, keys: int, window: int, programs: int
) -> Tensor:
    """Return [P + 2, 4]; see `kernels/decode_borders.py`. Only enqueues."""
    borders = torch.empty(programs + 2, 4, dtype=torch.int32, device=seq_lens_R.device)
    _cut[(triton.cdiv(programs + 1, BORDERS),)](
        seq_lens_R, seq_lens_R if unread_R is None else unread_R, borders, len(seq_lens_R), window,
        K=kv_heads, KEYS=keys, PROGRAMS=programs, SHORTEST=SHORTEST, HAS_UNREAD=unread_R is not None,
        BLOCK_R=max(MIN_ROWS, triton.next_power_of_2(len(seq_lens_R))), BORDERS=BORDERS, num_warps=4,
        **launch_options(seq_lens_R),
    )  # fmt: skip
    return borders
