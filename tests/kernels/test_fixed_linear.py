"""Is a product of fixed tiles a product, in bits of each token alone, with a schema and a fake?"""

from __future__ import annotations

import pytest
import torch

from slipstream.kernels.fixed_linear import fixed_linear, fixed_linear_op
from slipstream.kernels.fused_linear import GATED


def draw(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# Rounding of the result to the type, of sums of 96 products of size 1 over 10.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_it_is_a_product_whose_tokens_do_not_meet(dtype: torch.dtype, tolerance: float) -> None:
    x, weight = draw(13, 96, dtype=dtype), draw(40, 96, dtype=dtype, seed=1) / 10
    whole = fixed_linear(x, weight)
    torch.testing.assert_close(whole.double(), x.double() @ weight.double().T, rtol=tolerance, atol=tolerance)
    for token in (0, 6, 12):
        assert torch.equal(fixed_linear(x[token : token + 1], weight)[0], whole[token])
    assert torch.equal(fixed_linear(x[3:9], weight), whole[3:9])
    apart = draw(13, 192, dtype=dtype, seed=2)[:, :96]
    assert torch.equal(fixed_linear(apart, weight), fixed_linear(apart.contiguous(), weight))
    assert fixed_linear(x[:0], weight).shape == (0, 40)


@pytest.mark.parametrize("activation", ["", "silu", "gelu_pytorch_tanh"])
def test_what_stands_behind_it_is_what_the_ops_compute(activation: str) -> None:
    x, weight = draw(5, 96, dtype=torch.float32), draw(40, 96, dtype=torch.float32, seed=1) / 10
    product = fixed_linear(x, weight)
    expected = GATED[activation][1](product) if activation else product
    residual = draw(*expected.shape, dtype=torch.float32, seed=2)
    assert torch.equal(fixed_linear(x, weight, activation), expected)
    assert torch.equal(fixed_linear(x, weight, activation, residual), residual + expected)


def test_the_op_keeps_its_schema_and_fake() -> None:
    arguments = (draw(3, 8, dtype=torch.float32), draw(5, 8, dtype=torch.float32, seed=1))
    wide = (*arguments[:1], draw(6, 8, dtype=torch.float32, seed=1), "silu", draw(3, 3, dtype=torch.float32))
    for given in (arguments, wide):
        torch.library.opcheck(fixed_linear_op, given, test_utils=("test_schema", "test_faketensor"))
