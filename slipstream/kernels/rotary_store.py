"""How do q, k and v get from the projection to where attention reads them? The definition, op by op.

q and k are normed head by head where the model does so, then turned by their positions; k and v go to the
slots of the cache, q is returned.
T tokens, C = (N + 2K) * H columns, N query heads, K kv heads, H head size, P positions of the rotary table.
Invariant: a negative slot writes nothing (`kernels/store_slots.py`).
"""

from __future__ import annotations

from torch import Tensor

from slipstream.kernels.registration import register_op
from slipstream.kernels.rms_norm import rms_norm
from slipstream.kernels.rotary import rotary
from slipstream.kernels.store_slots import store_slots


def rotary_store(
    qkv_TC: Tensor,
    table_P2H: Tensor,
    positions_T: Tensor,
    q_norm_H: Tensor | None,
    k_norm_H: Tensor | None,
    eps: float,
    interleaved: bool,
    heads: int,
    kv_P2tKH: Tensor,
    slots_T: Tensor,
) -> Tensor:
    """Return q [T, N, H] in the type of `qkv_TC`, after writing k and v to their slots."""
    size = kv_P2tKH.shape[4]
    qkv_TAH = qkv_TC.unflatten(-1, (-1, size))
    kv_heads = (qkv_TAH.shape[1] - heads) // 2
    q_TNH, k_TKH, v_TKH = qkv_TAH.split((heads, kv_heads, kv_heads), dim=1)
    if q_norm_H is not None and k_norm_H is not None:
        q_TNH, k_TKH = rms_norm(q_TNH, q_norm_H, eps), rms_norm(k_TKH, k_norm_H, eps)
    table_T2H = table_P2H.index_select(0, positions_T)
    store_slots(rotary(k_TKH, table_T2H, interleaved), v_TKH, kv_P2tKH, slots_T)
    return rotary(q_TNH, table_T2H, interleaved).contiguous()


def _cuda(*arguments: object) -> Tensor:
    from slipstream.kernels.gpu.rotary_store import rotary_store as kernel

    return kernel(*arguments)  # type: ignore[arg-type]


def _fake(
    qkv_TC: Tensor,
    table_P2H: Tensor,
    positions_T: Tensor,
    q_norm_H: Tensor | None,
    k_norm_H: Tensor | None,
    eps: float,
    interleaved: bool,
    heads: int,
    kv_P2tKH: Tensor,
    slots_T: Tensor,
) -> Tensor:
    return qkv_TC.new_empty((qkv_TC.shape[0], heads, kv_P2tKH.shape[4]))


rotary_store_op = register_op(
    "rotary_store(Tensor qkv_TC, Tensor table_P2H, Tensor positions_T, Tensor? q_norm_H, Tensor? k_norm_H, "
    "float eps, bool interleaved, int heads, Tensor(a!) kv_P2tKH, Tensor slots_T) -> Tensor",
    rotary_store,
    _fake,
    cuda=_cuda,
)
