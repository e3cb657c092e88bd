# pyright: reportMissingImports=false, reportIndexIssue=false
"""How does one token meet a matrix on a GPU, together with what stands before and after the product?

Decoding one row is bound by reading weights. A program owns a few rows of W and walks over their columns in
wide tiles, so that enough bytes are on their way; the first tile is asked for before the kernel waits for the
one before it. An RMS norm in front costs nothing: its scale is one factor, 1 / sqrt(mean x^2 + eps), taken
out of the sum, and the squares are summed along the way. Behind it: a bias, a residual, or a gated
activation, whose gate and up rows one program owns together.
Invariant: float32 from the loads to the one rounding at the end.
O outputs, I inputs, F = O / 2 of a gated product.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from slipstream.kernels.gpu.gated_activation import activate
from slipstream.kernels.gpu.launching import launch_options, start_next, wait_for_previous

NO_ACTIVATION = -1


@triton.jit
def _load_rows(w_ptr, rows, at, k, size, mask_rows, inputs, IS_EVEN: tl.constexpr):
    place = w_ptr + rows.to(tl.int64)[:, None] * size + (at + k)[None, :]
    if IS_EVEN:
        return tl.load(place, eviction_policy="evict_first")
    return tl.load(place, mask=mask_rows[:, None] & (at + k < inputs)[None, :], other=0.0)


@triton.jit
def _gemv(
    x_ptr, norm_ptr, w_ptr, bias_ptr, residual_ptr, out_ptr, outputs, eps,
    INPUTS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, HAS_NORM: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr, IS_EVEN: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    start_next(PDL)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, BLOCK)
    is_row = rows < outputs
    w = _load_rows(w_ptr, rows, 0, k, INPUTS, is_row, INPUTS, IS_EVEN)
    if ACTIVATION >= 0:
        up = _load_rows(w_ptr, rows + outputs, 0, k, INPUTS, is_row, INPUTS, IS_EVEN)
    wait_for_previous(PDL)
    acc = tl.zeros((ROWS, BLOCK), tl.float32)
    acc_up = tl.zeros((ROWS, BLOCK), tl.float32)
    squares = tl.zeros((BLOCK,), tl.float32)
    for at in tl.static_range(0, INPUTS, BLOCK):
        if IS_EVEN:
            x = tl.load(x_ptr + at + k).to(tl.float32)
        else:
            x = tl.load(x_ptr + at + k, mask=at + k < INPUTS, other=0.0).to(tl.float32)
        if HAS_NORM:
            squares += x * x
            if IS_EVEN:
                x *= tl.load(norm_ptr + at + k)
            else:
                x *= tl.load(norm_ptr + at + k, mask=at + k < INPUTS, other=0.0)
        if at > 0:
            w = _load_rows(w_ptr, rows, at, k, INPUTS, is_row, INPUTS, IS_EVEN)
            if ACTIVATION >= 0:
                up = _load_rows(w_ptr, rows + outputs, at, k, INPUTS, is_row, INPUTS, IS_EVEN)
        acc += w.to(tl.float32) * x[None, :]
        if ACTIVATION >= 0:
            acc_up += up.to(tl.float32) * x[None, :]
    y = tl.sum(acc, 1)
    scale = 1.0
    if HAS_NORM:
        scale = tl.rsqrt(tl.sum(squares, 0) / INPUTS + eps)
        y *= scale
    if HAS_BIAS:
        y += tl.load(bias_ptr + rows, mask=is_row, other=0.0).to(tl.float32)
    if ACTIVATION >= 0:
        y_up = tl.sum(acc_up, 1) * scale
        if HAS_BIAS:
            y_up += tl.load(bias_ptr + outputs + rows, mask=is_row, other=0.0).to(tl.float32)
        y = activate(y, ACTIVATION) * y_up
    if HAS_RESIDUAL:
        y += tl.load(residual_ptr + rows, mask=is_row, other=0.0).to(tl.float32)
    tl.store(out_ptr + rows, y.to(out_ptr.dtype.element_ty), mask=is_row)


def gemv(
    x_1I: Tensor,
    weight_OI: Tensor,
    *,
    norm_I: Tensor | None = None,
    eps: float = 0.0,
    bias_O: Tensor | None = None,
    residual_1O: Tensor | None = None,
    activation: int = NO_ACTIVATION,
    tile: tuple[int, int, int],
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Return [1, O], or [1, F] of a gated product. `tile` is (rows, columns, warps). Only enqueues."""
    outputs, inputs = weight_OI.shape
    outputs = outputs // 2 if activation != NO_ACTIVATION else outputs
    out = torch.empty(1, outputs, dtype=out_dtype or x_1I.dtype, device=x_1I.device)
    rows, block, warps = tile
    block = min(block, triton.next_power_of_2(inputs))
    _gemv[(triton.cdiv(outputs, rows),)](
        x_1I, weight_OI if norm_I is None else norm_I, weight_OI, weight_OI if bias_O is None else bias_O,
        x_1I if residual_1O is None else residual_1O, out, outputs, eps,
        INPUTS=inputs, ROWS=rows, BLOCK=block, HAS_NORM=norm_I is not None, HAS_BIAS=bias_O is not None,
        HAS_RESIDUAL=residual_1O is not None, ACTIVATION=activation,
        IS_EVEN=inputs % block == 0 and outputs % rows == 0, num_warps=warps, **launch_options(x_1I),
    )  # fmt: skip
    return out
