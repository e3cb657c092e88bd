"""How does the one token of a step attend, from its projection on? The definition: store, then attend.

C = (N + 2K) * H columns of the projection, N query heads, K kv heads, H head size, P positions of the rotary
table.
Invariant: `rotary_store` followed by `paged_decode`, for a step of one row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slipstream.kernels.paged_decode import paged_decode
from slipstream.kernels.registration import register_op
from slipstream.kernels.rotary_store import rotary_store


def rotary_decode(
    qkv_1C: Tensor,
    rotary_P2H: Tensor,
    positions_1: Tensor,
    q_norm_H: Tensor | None,
    k_norm_H: Tensor | None,
    eps: float,
    interleaved: bool,
    heads: int,
    kv_P2tKH: Tensor,
    slots_1: Tensor,
    table_1C: Tensor,
    seq_lens_1: Tensor,
    counters: Tensor,
    max_len: int,
    scale: float,
    window: int,
    softcap: float,
) -> Tensor:
    """Return [1, N, H] after writing k and v to their slot; parameters as of the two ops it is."""
    q_1NH = rotary_store(
        qkv_1C, rotary_P2H, positions_1, q_norm_H, k_norm_H, eps, interleaved, heads, kv_P2tKH, slots_1
    )
    out_1NH = torch.empty_like(q_1NH)
    paged_decode(q_1NH, kv_P2tKH, table_1C, seq_lens_1, out_1NH, counters, max_len, scale, window, softcap)
    return out_1NH


def _cuda(*arguments: object) -> Tensor:
    from slipstream.kernels.gpu.rotary_decode import rotary_decode as kernel

    return kernel(*arguments)  # type: ignore[arg-type]


def _fake(qkv_1C: Tensor, *others: object) -> Tensor:
    heads, kv_P2tKH = others[6], others[7]
    assert isinstance(heads, int) and isinstance(kv_P2tKH, Tensor)
    return qkv_1C.new_empty((1, heads, kv_P2tKH.shape[4]))


rotary_decode_op = register_op(
    "rotary_decode(Tensor qkv_1C, Tensor rotary_P2H, Tensor positions_1, Tensor? q_norm_H, Tensor? k_norm_H, "
    "float eps, bool interleaved, int heads, Tensor(a!) kv_P2tKH, Tensor slots_1, Tensor table_1C, "
    "Tensor seq_lens_1, Tensor(b!) counters, int max_len, float scale, int window, float softcap) -> Tensor",
    rotary_decode,
    _fake,
    cuda=_cuda,
)
