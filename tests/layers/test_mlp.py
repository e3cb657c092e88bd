"""Do the MLPs compute their formulas, whole or as shards, and refuse an activation they do not know?"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers.activations import ACT2FN

from slipstream.core.errors import ConfigError
from slipstream.kernels.plugins import KERNELS
from slipstream.layers.build_context import BuildContext
from slipstream.layers.mlp import ACTIVATIONS, MLP, PLAIN_ACTIVATIONS, GatedMLP
from slipstream.quant.fixed_tiles import FixedTiles
from tests.layers.shards import contexts, draw, fill

UP, DOWN = draw(12, 8, seed=1), draw(8, 12, seed=2)
UP_BIAS, DOWN_BIAS = draw(12, seed=3), draw(8, seed=4)
X = draw(5, 8)


def plain(build: BuildContext, activation: str, *, bias: bool = True) -> MLP:
    mlp = MLP(build, 8, 12, activation=activation, bias=bias)
    fill(mlp.up.weight, UP)
    fill(mlp.down.weight, DOWN)
    if mlp.up.bias is not None and mlp.down.bias is not None:
        fill(mlp.up.bias, UP_BIAS)
        fill(mlp.down.bias, DOWN_BIAS)
    return mlp


@pytest.mark.parametrize("activation", PLAIN_ACTIVATIONS)
def test_a_plain_mlp_computes_its_formula(activation: str) -> None:
    hidden = ACT2FN[activation](functional.linear(X, UP, UP_BIAS))
    expected = functional.linear(hidden, DOWN, DOWN_BIAS)
    # float32 sums of 12 products in another order.
    torch.testing.assert_close(plain(BuildContext(), activation)(X), expected, rtol=1e-5, atol=1e-5)


def test_shards_of_a_plain_mlp_add_up() -> None:
    parts = [plain(context, "gelu_new", bias=False)(X) for context in contexts()]
    expected = plain(BuildContext(), "gelu_new", bias=False)(X)
    torch.testing.assert_close(parts[0] + parts[1], expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(parts[0], expected, atol=0.1)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_gated_mlp_computes_its_formula(activation: str) -> None:
    gate = draw(12, 8, seed=5)
    mlp = GatedMLP(BuildContext(), 8, 12, activation=activation)
    fill(mlp.gate_up.weight, gate, "gate")
    fill(mlp.gate_up.weight, UP, "up")
    fill(mlp.down.weight, DOWN)
    expected = functional.linear(ACT2FN[activation](X @ gate.T) * (X @ UP.T), DOWN)
    torch.testing.assert_close(mlp(X), expected, rtol=1e-5, atol=1e-5)


def ending(*, bias: bool) -> GatedMLP:
    mlp = GatedMLP(BuildContext(quant=FixedTiles()), 8, 12, bias=bias)
    fill(mlp.gate_up.weight, draw(12, 8, seed=5), "gate")
    fill(mlp.gate_up.weight, UP, "up")
    fill(mlp.down.weight, DOWN)
    if mlp.gate_up.bias is not None and mlp.down.bias is not None:
        fill(mlp.gate_up.bias, draw(12, seed=6), "gate")
        fill(mlp.gate_up.bias, UP_BIAS, "up")
        fill(mlp.down.bias, DOWN_BIAS)
    return mlp


@pytest.mark.parametrize(
    ("bias", "is_outside", "taken"),
    [(False, False, [("silu", False), ("", True)]), (True, False, [("", False)] * 2),
     (False, True, [("", False), ("", True)])],
    ids=["plain", "biases", "an outside activation"],
)  # fmt: skip
def test_products_take_along_what_nothing_stands_before(
    bias: bool, is_outside: bool, taken: list[tuple[str, bool]], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, bool]] = []
    whole = FixedTiles.apply_with_end

    def recorded(
        self: FixedTiles, layer: Any, x: Tensor, activation: str = "", residual: Tensor | None = None
    ) -> Tensor:
        calls.append((activation, residual is not None))
        return whole(self, layer, x, activation, residual)

    monkeypatch.setattr(FixedTiles, "apply_with_end", recorded)
    mlp, residual = ending(bias=bias), draw(5, 8, seed=9)
    if is_outside:
        monkeypatch.setattr(KERNELS, "on_gpu", frozenset({"silu_and_mul"}))
    given = mlp.add(X, residual)
    assert calls == taken
    gate_up = functional.linear(X, mlp.gate_up.weight, mlp.gate_up.bias)
    gate, up = gate_up.chunk(2, -1)
    expected = functional.linear(functional.silu(gate) * up, mlp.down.weight, mlp.down.bias) + residual
    torch.testing.assert_close(given, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mlp(X) + residual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [MLP, GatedMLP])
def test_an_unknown_activation_is_refused(kind: type) -> None:
    with pytest.raises(ConfigError, match=r"'silo'; valid: .*Did you mean 'silu'"):
        kind(BuildContext(), 8, 12, activation="silo")
