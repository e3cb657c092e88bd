"""How do the queries of longer spans attend to keys and values in pages? The definition; a GPU has a kernel.

Row b runs the tokens [query_start[b], query_start[b + 1]), the last of which stands at position
`seq_lens[b] - 1`; each sees itself and what came before it, within the window, or, in a tree of drafts, its
ancestors instead (`tree_masks.py`). Only rows that a tile names are computed: the others are one-token rows,
which `paged_decode` serves.
Invariant: a key that a query does not see never reaches it, a sibling's NaN included.
T tokens, N query heads, K kv heads, H head size, B rows, C blocks of the table, P pages, t tokens of a block,
M tiles.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slipstream.kernels.paged_decode import attend, gather
from slipstream.kernels.registration import register_op
from slipstream.kernels.tree_masks import visible_positions


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
) -> None:
    """Write the rows of `out_TNH` that the tiles name: line i is (row, first query within the row).

    A tile's size is the kernel's business (`tile_queries`); the definition computes whole rows and reads
    lengths on the host. `counters` are `NUM_COUNTERS` zeros, int32, that a kernel may count in and leaves at
    zero: with them it may cut the context of few queries, and their sums depend on how many there are.
    Without, what a query gets depends on its row alone. `tree_T`, int64, are the offsets that each token of a
    tree span sees as bits, 0 for tokens of other rows; without, no row is a tree.
    """
    for row in sorted({row for row, _ in tiles_M2.tolist()}):
        first, last, length = (int(x) for x in (*query_start_B[row : row + 2], seq_lens_B[row]))
        if tree_T is not None and last > first and int(tree_T[first]):
            cache = (kv_P2tKH, table_BC[row], length)
            settings = (scale, window, softcap)
            out_TNH[first:last] = _attend_tree(q_TNH[first:last], cache, tree_T[first:last], settings)
            continue
        position_T = torch.arange(length - (last - first), length, device=q_TNH.device)
        seen = max(0, int(position_T[0]) - window + 1) if window else 0
        k_LKH, v_LKH = gather(kv_P2tKH, table_BC[row], seen, length, q_TNH.dtype)
        key_L = torch.arange(seen, length, device=q_TNH.device)
        visible_TL = key_L <= position_T[:, None]
        if window:
            visible_TL &= key_L > position_T[:, None] - window
        out_TNH[first:last] = attend(q_TNH[first:last], k_LKH, v_LKH, visible_TL, scale, softcap)


def _attend_tree(
    q_TNH: Tensor,
    cache: tuple[Tensor, Tensor, int],
    tree_T: Tensor,
    settings: tuple[float, int, float],
) -> Tensor:
    """Attend token by token to nothing but what each sees: another branch's NaN is not even multiplied."""
    kv_P2tKH, table_C, length = cache
    scale, window, softcap = settings
    seen = max(0, length - len(q_TNH) - window + 1) if window else 0
    k_LKH, v_LKH = gather(kv_P2tKH, table_C, seen, length, q_TNH.dtype)
    visible_TL = visible_positions(tree_T, first=seen, length=length, window=window)
    each = [
        attend(q_TNH[i : i + 1], k_LKH[visible_L], v_LKH[visible_L], None, scale, softcap)
        for i, visible_L in enumerate(visible_TL)
    ]
    return torch.cat(each)


def _cuda(*arguments: object) -> None:
    from slipstream.kernels.gpu.paged_prefill import paged_prefill as kernel

    kernel(*arguments)  # type: ignore[arg-type]


def _fake(*arguments: object) -> None:
    return None


paged_prefill_op = register_op(
    "paged_prefill(Tensor q_TNH, Tensor kv_P2tKH, Tensor table_BC, Tensor seq_lens_B, Tensor query_start_B, "
    "Tensor tiles_M2, Tensor(a!) out_TNH, float scale, int window, float softcap, "
    "Tensor(b!)? counters=None, Tensor? tree_T=None) -> ()",
    paged_prefill,
    _fake,
    cuda=_cuda,
)
