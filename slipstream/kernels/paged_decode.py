"""How does one query per row attend to keys and values in pages? The definition; a GPU has a kernel for it.

Row i sees the positions [max(0, length - window), length) of its sequence, whose K and V stand in the pages
that line i of the table names. Invariant: positions outside are never read, so NaN there does no harm.
R rows, N query heads, K kv heads, H head size, C blocks of the table, P pages, t tokens of a block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slipstream.kernels.registration import register_op

# More than there are programs where a context is worth cutting.
NUM_COUNTERS = 4096


def paged_decode(
    q_RNH: Tensor,
    kv_P2tKH: Tensor,
    table_RC: Tensor,
    seq_lens_R: Tensor,
    out_RNH: Tensor,
    counters: Tensor,
    max_len: int,
    scale: float,
    window: int,
    softcap: float,
) -> None:
    """Write `out_RNH`. `max_len` bounds `seq_lens_R` from above; `window` and `softcap` are 0 where absent.

    `counters` are `NUM_COUNTERS` zeros, int32, that a kernel may count in and leaves at zero; the definition
    has no use for them. A row of length 0 gets zeros. The definition reads lengths on the host.
    """
    for row, length in enumerate(seq_lens_R.tolist()):
        if length == 0:
            out_RNH[row].zero_()
            continue
        first = max(0, length - window) if window else 0
        k_LKH, v_LKH = gather(kv_P2tKH, table_RC[row], first, length, q_RNH.dtype)
        out_RNH[row] = attend(q_RNH[row : row + 1], k_LKH, v_LKH, None, scale, softcap)[0]


def gather(
    kv_P2tKH: Tensor, table_C: Tensor, first: int, last: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return K and V of the positions [first, last) of one row, in `dtype`."""
    position = torch.arange(first, last, device=table_C.device)
    page = table_C[position // kv_P2tKH.shape[2]].long()
    offset = position % kv_P2tKH.shape[2]
    return kv_P2tKH[page, 0, offset].to(dtype), kv_P2tKH[page, 1, offset].to(dtype)


def attend(
    q_TNH: Tensor, k_LKH: Tensor, v_LKH: Tensor, visible_TL: Tensor | None, scale: float, softcap: float
) -> Tensor:
    """Return [T, N, H]: softmax in float32, products in the inputs' type."""
    group = q_TNH.shape[1] // k_LKH.shape[1]
    k_LNH, v_LNH = k_LKH.repeat_interleave(group, dim=1), v_LKH.repeat_interleave(group, dim=1)
    scores = torch.einsum("tnh,lnh->ntl", q_TNH, k_LNH).float() * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if visible_TL is not None:
        scores = scores.masked_fill(~visible_TL, float("-inf"))
    return torch.einsum("ntl,lnh->tnh", scores.softmax(-1).to(v_LNH.dtype), v_LNH)


def _cuda(*arguments: object) -> None:
    from slipstream.kernels.gpu.paged_decode import paged_decode as kernel

    kernel(*arguments)  # type: ignore[arg-type]


def _fake(*arguments: object) -> None:
    return None


paged_decode_op = register_op(
    "paged_decode(Tensor q_RNH, Tensor kv_P2tKH, Tensor table_RC, Tensor seq_lens_R, Tensor(a!) out_RNH, "
    "Tensor(b!) counters, int max_len, float scale, int window, float softcap) -> ()",
    paged_decode,
    _fake,
    cuda=_cuda,
)
