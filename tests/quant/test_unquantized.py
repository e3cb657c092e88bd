"""Does the unquantised method ask for one matrix and multiply by it?"""

from __future__ import annotations

import types

import torch

from slipstream.quant.unquantized import Unquantized


def test_one_matrix_in_the_models_type() -> None:
    (name, spec), *rest = Unquantized().create(in_features=6, out_features=4, dtype=torch.bfloat16).items()
    assert (name, rest) == ("weight", [])
    assert (spec.shape, spec.dtype, spec.out_dim, spec.in_dim) == ((4, 6), torch.bfloat16, 0, 1)


def test_apply_is_the_product_without_bias() -> None:
    weight, x = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0)).unbind(0)
    layer = types.SimpleNamespace(weight=weight, bias=torch.ones(4))
    Unquantized().load(layer)
    torch.testing.assert_close(Unquantized().apply(layer, x), x @ weight.T)
