# pyright: reportMissingImports=false, reportIndexIssue=false
"""How is a gated activation computed on a GPU? act(gate) * up, gate and up side by side.

R lines, F elements of gate and of up. Invariant: float32 inside whatever the type.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from slipstream.kernels.gpu.launching import launch_options, start_next, wait_for_previous

SILU, GELU, GELU_TANH = range(3)


class Way(NamedTuple):
    """How the work is cut and ordered: elements and warps of a program; whether programs go down the lines
    before the next elements, from the end (which the product before wrote last); how reads leave the L2.
    """

    block: int
    warps: int
    lines_first: bool
    last_first: bool
    hint: str


WAY = Way(1024, 4, lines_first=True, last_first=False, hint="")


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


@triton.jit(do_not_specialize=["lines", "blocks"])
def _gated(
    x_ptr, out_ptr, size, x_stride, lines, blocks, KIND: tl.constexpr, BLOCK: tl.constexpr,
    LINES_FIRST: tl.constexpr, LAST_FIRST: tl.constexpr, HINT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0)
    if LAST_FIRST:
        place = tl.num_programs(0) - 1 - place
    if LINES_FIRST:
        line, block = place % lines, place // lines
    else:
        line, block = place // blocks, place % blocks
    line = line.to(tl.int64)
    f = block * BLOCK + tl.arange(0, BLOCK)
    start_next(PDL)
    wait_for_previous(PDL)
    mask = f < size
    at = x_ptr + line * x_stride + f
    gate = tl.load(at, mask=mask, other=0.0, eviction_policy=HINT).to(tl.float32)
    up = tl.load(at + size, mask=mask, other=0.0, eviction_policy=HINT).to(tl.float32)
    out = activate(gate, KIND) * up
    tl.store(out_ptr + line * size + f, out.to(out_ptr.dtype.element_ty), mask=mask)


def gated_activation(x: Tensor, kind: int, way: Way = WAY) -> Tensor:
    """Return act(gate) * up of `x` [..., 2F] as [..., F]. Only enqueues. `way` is for tuning."""
    size = x.shape[-1] // 2
    x_R2F = x.reshape(-1, 2 * size)
    out = torch.empty((*x.shape[:-1], size), dtype=x.dtype, device=x.device)
    lines, blocks = len(x_R2F), -(-size // way.block)
    if out.numel():
        _gated[(lines * blocks,)](
            x_R2F, out, size, x_R2F.stride(0), lines, blocks, KIND=kind, BLOCK=way.block,
            LINES_FIRST=way.lines_first, LAST_FIRST=way.last_first, HINT=way.hint, num_warps=way.warps,
            **launch_options(x),
        )  # fmt: skip
    return out
