# pyright: reportMissingImports=false, reportIndexIssue=false
"""How is a root-mean-square norm computed on a GPU, alone or with the residual add before it?

One program takes one line. Invariant: as in the definition, the sum is rounded to the type of x before it is
normed, everything else is float32.
R lines, D elements of a line.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from slipstream.kernels.gpu.launching import launch_options, start_next, wait_for_previous


@triton.jit
def _norm(
    x_ptr, residual_ptr, weight_ptr, out_ptr, total_ptr, x_stride, residual_stride, eps,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, HAS_RESIDUAL: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    line = tl.program_id(0).to(tl.int64)
    start_next(PDL)
    d = tl.arange(0, BLOCK)
    mask = d < SIZE
    weight = tl.load(weight_ptr + d, mask=mask, other=0.0)
    wait_for_previous(PDL)
    x = tl.load(x_ptr + line * x_stride + d, mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        x += tl.load(residual_ptr + line * residual_stride + d, mask=mask, other=0.0).to(tl.float32)
        rounded = x.to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + line * SIZE + d, rounded, mask=mask)
        x = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, 0) / SIZE + eps)
    tl.store(out_ptr + line * SIZE + d, (x * scale * weight).to(out_ptr.dtype.element_ty), mask=mask)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return what `kernels/rms_norm.py` defines, contiguous. Only enqueues."""
    x_RD = _lines(x)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(x_RD, None, weight, out, out, eps)
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return (norm, sum) as `kernels/rms_norm.py` defines them, contiguous. Only enqueues."""
    out, total = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    _launch(_lines(x), _lines(residual), weight, out, total, eps)
    return out, total


def _lines(x: Tensor) -> Tensor:
    """Return x as [R, D] with adjacent elements; a copy only where its lines are not evenly apart."""
    return x.reshape(-1, x.shape[-1]) if x.stride(-1) == 1 else x.contiguous().view(-1, x.shape[-1])


def _launch(
    x_RD: Tensor, residual_RD: Tensor | None, weight: Tensor, out: Tensor, total: Tensor, eps: float
) -> None:
    lines, size = x_RD.shape
    if lines == 0:
        return
    block = triton.next_power_of_2(size)
    other = x_RD if residual_RD is None else residual_RD
    _norm[(lines,)](
        x_RD, other, weight, out, total, x_RD.stride(0), other.stride(0), eps,
        SIZE=size, BLOCK=block, HAS_RESIDUAL=residual_RD is not None,
        num_warps=max(1, min(16, block // 512)), **launch_options(x_RD),
    )  # fmt: skip
