"""How is a hidden state normalised? Root mean square, or mean and variance, with the weight as it is applied.

Invariant: weights are float32 whatever the model's type, as is the computation, and a family that multiplies
by 1 + w stores 1 + w when it loads, so that every norm of a kind computes the same thing.
Source of the second: Ba et al., Layer Normalization, arXiv 1607.06450.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from slipstream.kernels.plugins import KERNELS
from slipstream.kernels.rms_norm import add_rms_norm, add_rms_norm_op, rms_norm, rms_norm_op
from slipstream.layers.build_context import BuildContext
from slipstream.layers.parameter import Parameter


class RMSNorm(nn.Module):
    """Normalise the last dimension, whole on every rank."""

    def __init__(self, build: BuildContext, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = Parameter.create((size,), dtype=torch.float32, device=build.device)

    def forward(self, x: Tensor) -> Tensor:
        is_op = x.is_cuda or "rms_norm" in KERNELS.on_cpu
        return (rms_norm_op if is_op else rms_norm)(x, self.weight, self.eps)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Return (norm(x + residual), x + residual)."""
        is_op = x.is_cuda or "add_rms_norm" in KERNELS.on_cpu
        add_norm = add_rms_norm_op if is_op else add_rms_norm
        return add_norm(x, residual, self.weight, self.eps)


class LayerNorm(nn.Module):
    """Subtract the mean, divide by the deviation, scale and shift; whole on every rank."""

    def __init__(self, build: BuildContext, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = Parameter.create((size,), dtype=torch.float32, device=build.device)
        self.bias = Parameter.create((size,), dtype=torch.float32, device=build.device)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension and return x's type."""
        return layer_norm(x.float(), self.weight.shape, self.weight, self.bias, self.eps).to(x.dtype)
