"""Does the product of several tokens compute what its parts do, however it is cut?

The shapes are odd on purpose: tokens, outputs and inputs that no block divides. On a GPU `tests/kernels` runs
every tile of the table too.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.nn.functional import linear, silu

from tests.kernels.gpu.conftest import HAS_GPU, has_interpreter

if HAS_GPU or has_interpreter():
    from slipstream.kernels.gpu.matmul import Tile, matmul

SILU, EPS = 0, 1e-5
# float16 keeps 11 bits: 2^-12 for a rounding of the result, and one more for the product with the norm.
TOLERANCE = 2e-3
TOKENS = 20


@dataclasses.dataclass(frozen=True, slots=True)
class Cut:
    shares: int = 1
    weights_first: bool = True
    ahead: int = 0

    def tile(self) -> Tile:
        # The matrix unit of a GPU takes 64 rows; numpy takes any.
        size = 64 if HAS_GPU else 16
        return Tile(size, size, 32, 2, 4, self.shares, self.weights_first, self.ahead)


CUTS = [Cut(), Cut(weights_first=False), Cut(shares=2), Cut(shares=3, weights_first=False), Cut(shares=9)]


def draw(*shape: int, seed: int, device: str) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).half().to(device)


def assert_close(given: torch.Tensor, expected: torch.Tensor) -> None:
    assert bool(given.isfinite().all())
    error = (given.double() - expected).norm() / expected.norm()
    assert float(error) < TOLERANCE


@pytest.mark.parametrize("cut", CUTS, ids=str)
@pytest.mark.parametrize("inputs", [96, 160])
def test_a_sum_and_what_the_next_product_needs(device: str, inputs: int, cut: Cut) -> None:
    outputs = 72
    x, weight = draw(TOKENS, inputs, seed=0, device=device), draw(outputs, inputs, seed=1, device=device) / 8
    residual, bias = draw(TOKENS, outputs, seed=2, device=device), draw(outputs, seed=3, device=device)
    norm = torch.rand(outputs, device=device) + 0.5
    counters = torch.zeros(64, dtype=torch.int32, device=device)
    y, normed, squares = matmul(
        x, weight, tile=cut.tile(), bias_O=bias, residual_TO=residual, norm_O=norm, counters=counters
    )
    expected = linear(x.double(), weight.double(), bias.double()) + residual.double()
    assert_close(y, expected)
    assert_close(normed, expected * norm.double())
    torch.testing.assert_close(squares.sum(0), (y.float() ** 2).sum(-1), rtol=1e-4, atol=1e-3)
    assert not bool(counters.any())


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_a_gate_behind_a_scale(device: str, cut: Cut) -> None:
    inputs, half = 160, 40
    x, weight = draw(TOKENS, inputs, seed=0, device=device), draw(2 * half, inputs, seed=1, device=device) / 8
    bias = draw(2 * half, seed=2, device=device)
    squares = (torch.rand(3, TOKENS, device=device) + 0.1) * inputs / 3
    counters = torch.zeros(64, dtype=torch.int32, device=device)
    y, _, _ = matmul(
        x,
        weight,
        tile=cut.tile(),
        bias_O=bias,
        activation=SILU,
        squares_LT=squares,
        eps=EPS,
        counters=counters,
    )
    scale = torch.rsqrt(squares.double().sum(0) / inputs + EPS)[:, None]
    gate, up = (linear(x.double(), weight.double()) * scale + bias.double()).chunk(2, -1)
    assert_close(y, silu(gate) * up)
    assert not bool(counters.any())


@pytest.mark.skipif(HAS_GPU, reason="the ops take the kernels there")
def test_a_plain_product_of_any_number_of_tokens(device: str) -> None:
    weight = draw(80, 96, seed=1, device=device) / 8
    for tokens in (2, 16, 17, 33):
        x = draw(tokens, 96, seed=tokens, device=device)
        assert_close(matmul(x, weight, tile=Cut().tile())[0], linear(x.double(), weight.double()))
