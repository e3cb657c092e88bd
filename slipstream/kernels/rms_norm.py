"""How is a root-mean-square norm computed, alone or together with the residual add before it?

y = x / sqrt(mean(x^2) + eps) * weight over the last dimension. Invariant: mean, scale and the product with
the float32 weight are taken in float32 whatever the type of x; only the result is rounded.
Source: Zhang and Sennrich, Root Mean Square Layer Normalization, arXiv 1910.07467.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slipstream.kernels.registration import register_op


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise the last dimension of `x` [..., D]; `weight` [D] is float32. Returns x's type."""
    if x.dtype == torch.float32:
        return torch.rms_norm(x, weight.shape, weight, eps)
    return torch.rms_norm(x.float(), weight.shape, weight, eps).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return (rms_norm(x + residual), x + residual); the sum is rounded to x's type first."""
    total = x + residual
    return rms_norm(total, weight, eps), total


def _fake(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape)


def _add_fake(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


def _cuda(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    if x.dtype == torch.float64:
        return rms_norm(x, weight, eps)
    from slipstream.kernels.gpu.rms_norm import rms_norm as kernel

    return kernel(x, weight, eps)


def _add_cuda(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    if x.dtype == torch.float64:
        return add_rms_norm(x, residual, weight, eps)
    from slipstream.kernels.gpu.rms_norm import add_rms_norm as kernel

    return kernel(x, residual, weight, eps)


rms_norm_op = register_op(
    "rms_norm(Tensor x, Tensor weight, float eps) -> Tensor", rms_norm, _fake, cuda=_cuda
)
add_rms_norm_op = register_op(
    "add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor)",
    add_rms_norm,
    _add_fake,
    cuda=_add_cuda,
)
