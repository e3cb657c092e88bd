"""Is the root-mean-square norm right in every type, alone and after a residual add?"""

from __future__ import annotations

import pytest
import torch

from slipstream.kernels.rms_norm import add_rms_norm, rms_norm

# Rounding of the result to the type; the arithmetic itself is float32.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def expected(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    x = x.double()
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight.double()


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("shape", [(1, 8), (7, 576), (3, 4, 64), (2, 1)])
def test_norm_matches_its_formula(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    x = (3 * torch.randn(shape, generator=generator)).to(dtype)
    weight = torch.rand(shape[-1], generator=generator) + 0.5
    given = rms_norm(x, weight, 1e-5)
    assert given.dtype == dtype
    torch.testing.assert_close(
        given.double(), expected(x, weight, 1e-5), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype]
    )


def test_epsilon_is_inside_the_root() -> None:
    x = torch.full((1, 4), 1e-3)
    torch.testing.assert_close(rms_norm(x, torch.ones(4), 1e-6), torch.full((1, 4), 0.5**0.5))


def test_large_half_precision_values_do_not_overflow() -> None:
    x = torch.full((1, 64), 3e4, dtype=torch.float16)
    torch.testing.assert_close(rms_norm(x, torch.ones(64), 1e-6), torch.ones(1, 64, dtype=torch.float16))


def test_residual_add_returns_norm_and_sum() -> None:
    x, residual, weight = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(2)).unbind(0)
    normed, total = add_rms_norm(x, residual, weight[0], 1e-6)
    torch.testing.assert_close(total, x + residual, rtol=0, atol=0)
    torch.testing.assert_close(normed, rms_norm(x + residual, weight[0], 1e-6), rtol=0, atol=0)
