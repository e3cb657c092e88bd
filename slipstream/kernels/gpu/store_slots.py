# pyright: reportMissingImports=false, reportIndexIssue=false
"""How are keys and values written to their slots on a GPU? One program per token and kv head.

T tokens, K kv heads, H head size, P pages, t tokens of a block. Invariant: a negative slot writes nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from slipstream.kernels.gpu.launching import launch_options, start_next, wait_for_previous


@triton.jit(
    do_not_specialize_on_alignment=["slots_ptr"],
)
def _store(
    k_ptr, v_ptr, kv_ptr, slots_ptr, k_stride_t, k_stride_k, v_stride_t, v_stride_k,
    page_stride, v_offset, token_stride, head_stride,
    HEAD: tl.constexpr, PAGE: tl.constexpr, BLOCK_H: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    start_next(PDL)
    wait_for_previous(PDL)
    slot = tl.load(slots_ptr + token).to(tl.int64)
    if slot < 0:
        return
    h = tl.arange(0, BLOCK_H)
    place = kv_ptr + slot // PAGE * page_stride + slot % PAGE * token_stride + head * head_stride + h
    k = tl.load(k_ptr + token * k_stride_t + head * k_stride_k + h, mask=h < HEAD)
    v = tl.load(v_ptr + token * v_stride_t + head * v_stride_k + h, mask=h < HEAD)
    tl.store(place, k.to(kv_ptr.dtype.element_ty), mask=h < HEAD)
    tl.store(place + v_offset, v.to(kv_ptr.dtype.element_ty), mask=h < HEAD)


def store_slots(k_TKH: Tensor, v_TKH: Tensor, kv_P2tKH: Tensor, slots_T: Tensor) -> None:
    """Write K and V of every token that has a slot. Only enqueues."""
    tokens, heads, size = k_TKH.shape
    if tokens == 0:
        return
    _store[(tokens, heads)](
        k_TKH, v_TKH, kv_P2tKH, slots_T,
        k_TKH.stride(0), k_TKH.stride(1), v_TKH.stride(0), v_TKH.stride(1),
        kv_P2tKH.stride(0), kv_P2tKH.stride(1), kv_P2tKH.stride(2), kv_P2tKH.stride(3),
        HEAD=size, PAGE=kv_P2tKH.shape[2], BLOCK_H=triton.next_power_of_2(size), num_warps=1,
        **launch_options(k_TKH),
    )  # fmt: skip
