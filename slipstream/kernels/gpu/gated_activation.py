# pyright: reportMissingImports=false, reportIndexIssue=false
"""How is a gated activation computed on a GPU? act(gate) * up, gate and up side by side.

R lines, F elements of gate and of up. Invariant: float32 inside whatever the type.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from slipstream.kernels.gpu.launching import launch_options, start_next, wait_for_previous

SILU, GELU, GELU_TANH = range(3)
BLOCK = 1024


@triton.jit
def activate(gate, KIND: tl.constexpr):
    """Return the activation of a float32 tensor; KIND is one of SILU (0), GELU (1), GELU_TANH (2)."""
    if KIND == 0:
        return gate / (1.0 + tl.exp(-gate))
    elif KIND == 1:
        return 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    else:
        inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        # 0.5 (1 + tanh(y)) is the logistic function of 2y.
        return gate / (1.0 + tl.exp(-2.0 * inner))


@triton.jit
def _gated(
    x_ptr, out_ptr, size, x_stride, KIND: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    line = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    start_next(PDL)
    wait_for_previous(PDL)
    mask = f < size
    gate = tl.load(x_ptr + line * x_stride + f, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + line * x_stride + size + f, mask=mask, other=0.0).to(tl.float32)
    out = activate(gate, KIND) * up
    tl.store(out_ptr + line * size + f, out.to(out_ptr.dtype.element_ty), mask=mask)


def gated_activation(x: Tensor, kind: int) -> Tensor:
    """Return act(gate) * up of `x` [..., 2F] as [..., F]. Only enqueues."""
    size = x.shape[-1] // 2
    x_R2F = x.reshape(-1, 2 * size)
    out = torch.empty((*x.shape[:-1], size), dtype=x.dtype, device=x.device)
    if out.numel():
        _gated[(len(x_R2F), triton.cdiv(size, BLOCK))](
            x_R2F, out, size, x_R2F.stride(0), KIND=kind, BLOCK=BLOCK, num_warps=4, **launch_options(x)
        )
    return out
