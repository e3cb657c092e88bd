"""How does one query per row attend where some rows are long and some short? As `paged_decode`: its numbers.

Beside what that op takes there are the borders between the shares of the programs (`decode_borders.py`),
which a kernel follows; they change no result, and the definition has no use for them.
R rows, N query heads, K kv heads, H head size, C blocks of the table, P pages, t tokens of a block.
"""

from __future__ import annotations

from torch import Tensor

from slipstream.kernels.paged_decode import paged_decode
from slipstream.kernels.registration import register_op


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
) -> None:
    """Write `out_RNH`; `counters` are zeros, more than there are programs, and left at zero."""
    paged_decode(q_RNH, kv_P2tKH, table_RC, seq_lens_R, out_RNH, counters, 0, scale, window, softcap)


def _cuda(*arguments: object) -> None:
    from slipstream.kernels.gpu.balanced_decode import balanced_decode as kernel

    kernel(*arguments)  # type: ignore[arg-type]


def _fake(*arguments: object) -> None:
    return None


balanced_decode_op = register_op(
    "balanced_decode(Tensor q_RNH, Tensor kv_P2tKH, Tensor table_RC, Tensor seq_lens_R, Tensor borders, "
    "Tensor(a!) out_RNH, Tensor(b!) counters, float scale, int window, float softcap) -> ()",
    balanced_decode,
    _fake,
    cuda=_cuda,
)
