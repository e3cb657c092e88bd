"""Where is the work of a step of one-token rows cut, so that every program of a GPU gets the same?

The blocks of keys of all rows and kv heads stand in one line: row by row, kv head by kv head. The line is cut
into equal shares, one for each program; a cut near the end of a row and kv head moves there, for joining
costs more than it evens out. All layers of a step that see as far share the borders.
Invariant: the lengths are read on the device alone, so a captured step cuts for those it is replayed with.
Sources: Osama et al., Stream-K, arXiv 2301.03598. R rows, K kv heads, P programs, U units (blocks of keys of
one row and kv head).
"""

from __future__ import annotations

import torch
from torch import Tensor

from slipstream.kernels.decode_shares import SHORTEST
from slipstream.kernels.registration import register_op


def decode_borders(
    seq_lens_R: Tensor, unread_R: Tensor | None, kv_heads: int, keys: int, window: int, programs: int
) -> Tensor:
    """Return [P + 2, 4] int32: program p works from line p to line p + 1; the last line is about all.

    A line holds the unit where the border stands, row * K + kv head of what stands there, the unit where that
    begins, and the row's length (behind the last row 0); the last line the length of a share and how many of
    the first ones are a unit longer. Of row i the first `unread_R[i]` positions are not read, nor those
    before the window (0: none).
    """
    lens_R = seq_lens_R.long()
    first_R = torch.zeros_like(lens_R) if unread_R is None else torch.minimum(unread_R.long(), lens_R)
    if window:
        first_R = torch.maximum(first_R, lens_R - window)
    units_R = (lens_R - first_R + keys - 1) // keys
    ends_R = units_R.cumsum(0) * kv_heads
    total = ends_R[-1]
    shares = (total // SHORTEST).clamp(1, programs)
    share, longer = total // shares, total % shares
    idx_P = torch.arange(programs + 1, device=lens_R.device)
    unit_P = torch.minimum(idx_P * share + torch.minimum(idx_P, longer), total)
    row_P = (ends_R[None, :] <= unit_P[:, None]).sum(1)
    start_P = torch.cat((ends_R.new_zeros(1), ends_R))[row_P]
    # Behind the last row nothing stands: one unit, so that the border stays.
    units_P = torch.cat((units_R, units_R.new_ones(1)))[row_P]
    offset_P = (unit_P - start_P) % units_P
    is_near = torch.minimum(offset_P, units_P - offset_P) < SHORTEST
    nearest_P = torch.where(offset_P * 2 <= units_P, 0, units_P)
    moved_P = torch.where(is_near, nearest_P, offset_P)
    item_P = row_P * kv_heads + (unit_P - start_P) // units_P
    begin_P = unit_P - offset_P
    length_P = torch.cat((lens_R, lens_R.new_zeros(1)))[row_P]
    lines_P4 = torch.stack((begin_P + moved_P, item_P, begin_P, length_P), dim=1)
    zero = torch.zeros_like(share)
    return torch.cat((lines_P4, torch.stack((share, longer, zero, zero))[None])).int()


def _cuda(*arguments: object) -> Tensor:
    from slipstream.kernels.gpu.decode_borders import decode_borders as kernel

    return kernel(*arguments)  # type: ignore[arg-type]


def _fake(seq_lens_R: Tensor, *others: object) -> Tensor:
    programs = others[-1]
    assert isinstance(programs, int)
    return seq_lens_R.new_empty((programs + 2, 4), dtype=torch.int32)


decode_borders_op = register_op(
    "decode_borders(Tensor seq_lens_R, Tensor? unread_R, int kv_heads, int keys, int window, int programs) "
    "-> Tensor",
    decode_borders,
    _fake,
    cuda=_cuda,
)
