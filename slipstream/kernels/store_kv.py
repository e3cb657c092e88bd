"""How do a step's keys and values get into the pages of the cache?

T tokens, P pages, t tokens of a block, H kv heads, D head size. Invariant: exactly the slots named are
written, each one whole; pages may be a strided view (one layer of pages that several layers share).
"""

from __future__ import annotations

from torch import Tensor

from slipstream.kernels.registration import register_op


def store_kv(k_THD: Tensor, v_THD: Tensor, kv_P2tHD: Tensor, page_T: Tensor, offset_T: Tensor) -> None:
    """Write K and V of token i to page `page_T[i]`, position `offset_T[i]`, rounded to the pages' type."""
    slots = (page_T, offset_T)
    dtype = kv_P2tHD.dtype
    kv_P2tHD[:, 0].index_put_(slots, k_THD.to(dtype))
    kv_P2tHD[:, 1].index_put_(slots, v_THD.to(dtype))


def _fake(k_THD: Tensor, v_THD: Tensor, kv_P2tHD: Tensor, page_T: Tensor, offset_T: Tensor) -> None:
    return None


store_kv_op = register_op(
    "store_kv(Tensor k_THD, Tensor v_THD, Tensor(a!) kv_P2tHD, Tensor page_T, Tensor offset_T) -> ()",
    store_kv,
    _fake,
)
