"""How is a GeGLU activation computed from a fused gate and up projection?

y = gelu(gate) * up, where the last dimension of x holds gate, then up, of equal size; gelu is exact or its
tanh approximation. Source: Shazeer, GLU Variants Improve Transformer, arXiv 2002.05202.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from slipstream.kernels.registration import register_op


def gelu_and_mul(x: Tensor, approximate: str = "none") -> Tensor:
    """Return gelu(gate) * up of `x` [..., 2F] as [..., F] in x's type; `approximate` is "none" or "tanh"."""
    gate, up = x.chunk(2, dim=-1)
    return functional.gelu(gate, approximate=approximate).mul_(up)


def gelu_tanh_and_mul(x: Tensor) -> Tensor:
    """`gelu_and_mul` with the tanh approximation (`gelu_pytorch_tanh` in Hugging Face's words)."""
    return gelu_and_mul(x, "tanh")


def _fake(x: Tensor, approximate: str = "none") -> Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


def _cuda(x: Tensor, approximate: str = "none") -> Tensor:
    from slipstream.kernels.gpu.gated_activation import GELU, GELU_TANH, gated_activation

    return gated_activation(x, GELU_TANH if approximate == "tanh" else GELU)


gelu_and_mul_op = register_op(
    'gelu_and_mul(Tensor x, str approximate="none") -> Tensor', gelu_and_mul, _fake, cuda=_cuda
)
