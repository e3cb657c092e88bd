"""Are the gated activations what their formulas say, with gate before up?"""

from __future__ import annotations

import math

import pytest
import torch

from slipstream.kernels.gelu_and_mul import gelu_and_mul, gelu_tanh_and_mul
from slipstream.kernels.silu_and_mul import silu_and_mul


def silu(x: torch.Tensor) -> torch.Tensor:
    return x / (1 + torch.exp(-x))


def gelu(x: torch.Tensor) -> torch.Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


@pytest.mark.parametrize(
    ("function", "activation"),
    [(silu_and_mul, silu), (gelu_and_mul, gelu), (gelu_tanh_and_mul, gelu_tanh)],
)
# Half a unit in the last place of each type, twice: the activation and the product are rounded.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1.6e-2)])
def test_formula(function, activation, dtype: torch.dtype, tolerance: float) -> None:
    x = (2 * torch.randn(7, 24, generator=torch.Generator().manual_seed(3))).to(dtype)
    before = x.clone()
    gate, up = x.double().split(12, dim=-1)
    given = function(x)
    assert given.dtype == dtype and given.shape == (7, 12)
    torch.testing.assert_close(given.double(), activation(gate) * up, rtol=tolerance, atol=tolerance)
    assert torch.equal(x, before)
