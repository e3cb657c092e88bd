"""How is a SwiGLU activation computed from a fused gate and up projection?

y = silu(gate) * up, where the last dimension of x holds gate, then up, of equal size.
Source: Shazeer, GLU Variants Improve Transformer, arXiv 2002.05202.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from slipstream.kernels.registration import register_op


def silu_and_mul(x: Tensor) -> Tensor:
    """Return silu(gate) * up of `x` [..., 2F] as [..., F] in x's type."""
    gate, up = x.chunk(2, dim=-1)
    return functional.silu(gate).mul_(up)


def _fake(x: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


def _cuda(x: Tensor) -> Tensor:
    from slipstream.kernels.gpu.gated_activation import SILU, gated_activation

    return gated_activation(x, SILU)


silu_and_mul_op = register_op("silu_and_mul(Tensor x) -> Tensor", silu_and_mul, _fake, cuda=_cuda)
