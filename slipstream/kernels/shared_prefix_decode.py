"""How does one query per row attend where rows begin with the same pages? The definition.

As `paged_decode`, but the shared positions of a row are read by the table of the first row of its group; the
own entries for them are not. A GPU has kernels that read them once for all rows of a tile.
R rows, N query heads, K kv heads, H head size, C blocks of the table, P pages, t tokens of a block.
E entries.
Source: Juravsky et al., Hydragen, arXiv 2402.05099 (one level of sharing, as here).
"""

from __future__ import annotations

import torch
from torch import Tensor

from slipstream.kernels.paged_decode import attend, gather
from slipstream.kernels.registration import register_op


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
    """Write `out_RNH`. The four tensors after `borders` are a `SharedPrefixes`; a row of length 0 gets zeros.

    `borders` and `counters` are for a kernel, the former made for what each row has of its own. The
    definition reads lengths on the host.
    """
    for row, length in enumerate(seq_lens_R.tolist()):
        if length == 0:
            out_RNH[row].zero_()
            continue
        shared, entry = rows_5R[:2, row].tolist()
        leader = int(entries_E5[entry, 2]) if shared else row
        first = gather(kv_P2tKH, table_RC[leader], 0, shared, q_RNH.dtype)
        second = gather(kv_P2tKH, table_RC[row], shared, length, q_RNH.dtype)
        k_LKH, v_LKH = (torch.cat(both) for both in zip(first, second, strict=True))
        out_RNH[row] = attend(q_RNH[row : row + 1], k_LKH, v_LKH, None, scale, softcap)[0]


def _cuda(*arguments: object) -> None:
    from slipstream.kernels.gpu.shared_prefix_decode import shared_prefix_decode as kernel

    kernel(*arguments)  # type: ignore[arg-type]


def _fake(*arguments: object) -> None:
    return None


shared_prefix_decode_op = register_op(
    "shared_prefix_decode(Tensor q_RNH, Tensor kv_P2tKH, Tensor table_RC, Tensor seq_lens_R, Tensor borders, "
    "Tensor count_1, Tensor entries_E5, Tensor members_R, Tensor rows_5R, Tensor(a!) out_RNH, "
    "Tensor(b!) counters, float scale, float softcap) -> ()",
    shared_prefix_decode,
    _fake,
    cuda=_cuda,
)
