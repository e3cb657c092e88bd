# pyright: reportMissingImports=false, reportIndexIssue=false
"""How do tokens meet a matrix on a GPU with the same bits, however many they are? In tiles of one shape.

Every product, of one token or of thousands, is cut into tiles of the same size, each of which walks over all
inputs in the same steps: no split along the inputs, no choice by shape. Lines behind the last are zeros. A
line of a tile has the bits that it has on any other line, since a matrix unit adds up each line alike.
Invariant: what a line of `x` gives depends on that line and the weights.
T tokens, I inputs, O outputs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from slipstream.kernels.gpu.launching import launch_options, start_next, wait_for_previous

# 64 lines are the least that a Hopper matrix unit takes at once; 64 outputs keep enough programs at work.
BLOCK_T, BLOCK_O, BLOCK_I = 64, 64, 64
BLOCK_I_FLOAT32 = 32


@triton.jit
def _fixed_matmul(
    x_ptr, w_ptr, y_ptr, tokens, outputs, inputs, x_stride, w_stride,
    BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, IS_EVEN: tl.constexpr,
    IS_EXACT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    start_next(PDL)
    t = tl.program_id(1).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    o = tl.program_id(0).to(tl.int64) * BLOCK_O + tl.arange(0, BLOCK_O)
    i = tl.arange(0, BLOCK_I)
    is_token, is_output = t < tokens, o < outputs
    acc = tl.zeros((BLOCK_T, BLOCK_O), tl.float32)
    wait_for_previous(PDL)
    for at in range(0, inputs, BLOCK_I):
        is_input = i < inputs - at
        if IS_EVEN:
            x = tl.load(x_ptr + t[:, None] * x_stride + (at + i)[None, :], mask=is_token[:, None], other=0.0)
            w = tl.load(w_ptr + o[:, None] * w_stride + (at + i)[None, :], mask=is_output[:, None], other=0.0)
        else:
            x_mask, w_mask = is_token[:, None] & is_input[None, :], is_output[:, None] & is_input[None, :]
            x = tl.load(x_ptr + t[:, None] * x_stride + (at + i)[None, :], mask=x_mask, other=0.0)
            w = tl.load(w_ptr + o[:, None] * w_stride + (at + i)[None, :], mask=w_mask, other=0.0)
        if IS_EXACT:
            acc += tl.dot(x, tl.trans(w), input_precision="ieee")
        else:
            acc = tl.dot(x, tl.trans(w), acc)
    place = y_ptr + t[:, None] * outputs + o[None, :]
    tl.store(place, acc.to(y_ptr.dtype.element_ty), mask=is_token[:, None] & is_output[None, :])


def fixed_matmul(x_TI: Tensor, weight_OI: Tensor) -> Tensor:
    """Return x @ W^T, [T, O] in x's type. Only enqueues."""
    x_TI = x_TI if x_TI.stride(-1) == 1 else x_TI.contiguous()
    tokens, inputs = x_TI.shape
    outputs = weight_OI.shape[0]
    y = torch.empty(tokens, outputs, dtype=x_TI.dtype, device=x_TI.device)
    if tokens == 0:
        return y
    is_exact = x_TI.dtype == torch.float32
    block_i = BLOCK_I_FLOAT32 if is_exact else BLOCK_I
    # Outputs first: programs that share their weights follow one another, and find them in the cache.
    grid = (triton.cdiv(outputs, BLOCK_O), triton.cdiv(tokens, BLOCK_T))
    _fixed_matmul[grid](
        x_TI, weight_OI, y, tokens, outputs, inputs, x_TI.stride(0), weight_OI.stride(0),
        BLOCK_T=BLOCK_T, BLOCK_O=BLOCK_O, BLOCK_I=block_i, IS_EVEN=inputs % block_i == 0, IS_EXACT=is_exact,
        num_warps=4, num_stages=1 if is_exact else 4, **launch_options(x_TI),
    )  # fmt: skip
    return y
