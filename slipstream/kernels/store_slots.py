"""How do a step's keys and values get into the cache when some tokens of the step are padding?

Token i goes to slot `slots_T[i]` = page * t + offset, and nowhere where that is negative. A captured graph
runs for a fixed number of rows, so its unused ones must be able to write nothing.
T tokens, K kv heads, H head size, P pages, t tokens of a block. Invariant: exactly the slots named are
written, each one whole.
"""

from __future__ import annotations

from torch import Tensor

from slipstream.kernels.registration import register_op
from slipstream.kernels.store_kv import store_kv


def store_slots(k_TKH: Tensor, v_TKH: Tensor, kv_P2tKH: Tensor, slots_T: Tensor) -> None:
    """Write K and V of every token that has a slot, rounded to the pages' type. The definition may block."""
    real_R = (slots_T >= 0).nonzero()[:, 0]
    slot_R, block_tokens = slots_T[real_R].long(), kv_P2tKH.shape[2]
    store_kv(k_TKH[real_R], v_TKH[real_R], kv_P2tKH, slot_R // block_tokens, slot_R % block_tokens)


def _cuda(k_TKH: Tensor, v_TKH: Tensor, kv_P2tKH: Tensor, slots_T: Tensor) -> None:
    from slipstream.kernels.gpu.store_slots import store_slots as kernel

    kernel(k_TKH, v_TKH, kv_P2tKH, slots_T)


def _fake(k_TKH: Tensor, v_TKH: Tensor, kv_P2tKH: Tensor, slots_T: Tensor) -> None:
    return None


store_slots_op = register_op(
    "store_slots(Tensor k_TKH, Tensor v_TKH, Tensor(a!) kv_P2tKH, Tensor slots_T) -> ()",
    store_slots,
    _fake,
    cuda=_cuda,
)
