"""Are the norms those of torch in float32, in whatever type the hidden states come?"""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from slipstream.layers.build_context import BuildContext
from slipstream.layers.norm import LayerNorm, RMSNorm
from tests.layers.shards import draw, fill

WEIGHT, BIAS = 1 + draw(48, seed=1), draw(48, seed=2)


def expected(kind: type, x: torch.Tensor) -> torch.Tensor:
    x64 = x.double()
    if kind is RMSNorm:
        return x64 / (x64.square().mean(-1, keepdim=True) + 1e-5).sqrt() * WEIGHT.double()
    return functional.layer_norm(x64, (48,), WEIGHT.double(), BIAS.double(), 1e-5)


@pytest.mark.parametrize("kind", [RMSNorm, LayerNorm])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_are_taken_in_float32(kind: type, dtype: torch.dtype) -> None:
    norm = kind(BuildContext(dtype=dtype), 48, 1e-5)
    assert norm.weight.dtype == torch.float32
    fill(norm.weight, WEIGHT)
    if kind is LayerNorm:
        fill(norm.bias, BIAS)
    # An offset of 100 costs a norm in 16 bits all but two digits of the mean.
    x = (draw(5, 48) + 100).to(dtype)
    given = norm(x)
    assert given.dtype == dtype
    # Only the result is rounded: float32's own error over a mean of 100, or bfloat16's half unit of 2^-9.
    tolerance = 1e-4 if dtype == torch.float32 else 2**-8
    torch.testing.assert_close(given.double(), expected(kind, x), rtol=tolerance, atol=tolerance)
