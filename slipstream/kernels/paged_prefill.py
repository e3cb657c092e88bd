"""How do the queries of longer spans attend to keys and values in pages? The definition; a GPU has a kernel.

Row b runs the tokens [query_start[b], query_start[b + 1]), the last of which stands at position
`seq_lens[b] - 1`; each sees itself and what came before it, within the window. Only rows that a tile names
are computed: the others are one-token rows, which `paged_decode` serves.
T tokens, N query heads, K kv heads, H head size, B rows, C blocks of the table, P pages, t tokens of a block,
M tiles.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slipstream.kernels.paged_decode import attend, gather
from slipstream.kernels.registration import register_op


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
) -> None:
    """Write the rows of `out_TNH` that the tiles name: line i is (row, first query within the row).

    A tile's size is the kernel's business (`tile_queries`); the definition computes whole rows and reads
    lengths on the host. `counters` are `NUM_COUNTERS` zeros, int32, that a kernel may count in and leaves at
    zero: with them it may cut the context of few queries, and their sums depend on how many there are.
    Without, what a query gets depends on its row alone.
    """
    for row in sorted({row for row, _ in tiles_M2.tolist()}):
        first, last, length = (int(x) for x in (*query_start_B[row : row + 2], seq_lens_B[row]))
        position_T = torch.arange(length - (last - first), length, device=q_TNH.device)
        seen = max(0, int(position_T[0]) - window + 1) if window else 0
        k_LKH, v_LKH = gather(kv_P2tKH, table_BC[row], seen, length, q_TNH.dtype)
        key_L = torch.arange(seen, length, device=q_TNH.device)
        visible_TL = key_L <= position_T[:, None]
        if window:
            visible_TL &= key_L > position_T[:, None] - window
        out_TNH[first:last] = attend(q_TNH[first:last], k_LKH, v_LKH, visible_TL, scale, softcap)


def _cuda(*arguments: object) -> None:
    from slipstream.kernels.gpu.paged_prefill import paged_prefill as kernel

    kernel(*arguments)  # type: ignore[arg-type]


def _fake(*arguments: object) -> None:
    return None


paged_prefill_op = register_op(
    "paged_prefill(Tensor q_TNH, Tensor kv_P2tKH, Tensor table_BC, Tensor seq_lens_B, Tensor query_start_B, "
    "Tensor tiles_M2, Tensor(a!) out_TNH, float scale, int window, float softcap, "
    "Tensor(b!)? counters=None) -> ()",
    paged_prefill,
    _fake,
    cuda=_cuda,
)
