"""Do the shards of every linear layer add up to the whole layer?"""

from __future__ import annotations

import pytest
import torch

from slipstream.core.errors import ConfigError
from slipstream.layers.build_context import BuildContext
from slipstream.layers.linear import (
    ColumnParallelLinear,
    GateUpLinear,
    QKVLinear,
    RowParallelLinear,
    local_kv_heads,
)
from tests.layers.shards import contexts, draw, fill

X = draw(5, 12)


@pytest.mark.parametrize("bias", [False, True])
def test_column_shards_concatenate(bias: bool) -> None:
    weight, b = draw(8, 12, seed=1), draw(8, seed=2)
    parts = []
    for context in contexts():
        layer = ColumnParallelLinear(context, 12, 8, bias=bias)
        fill(layer.weight, weight)
        if layer.bias is not None:
            fill(layer.bias, b)
        parts.append(layer(X))
    torch.testing.assert_close(torch.cat(parts, -1), X @ weight.T + (b if bias else 0))


@pytest.mark.parametrize("bias", [False, True])
def test_row_shards_sum_and_the_bias_counts_once(bias: bool) -> None:
    weight, b = draw(8, 12, seed=1), draw(8, seed=2)
    total, epilogue = torch.zeros(5, 8), None
    for rank, context in enumerate(contexts()):
        layer = RowParallelLinear(context, 12, 8, bias=bias)
        fill(layer.weight, weight)
        if layer.bias is not None:
            fill(layer.bias, b)
        total, epilogue = total + layer.gemm(X.chunk(2, -1)[rank]), layer.epilogue
    assert epilogue is not None
    torch.testing.assert_close(epilogue(total), X @ weight.T + (b if bias else 0))


@pytest.mark.parametrize("size", [1, 2, 4])
def test_qkv_slots_hold_the_right_heads(size: int) -> None:
    q, k, v = draw(16, 12, seed=1), draw(8, 12, seed=2), draw(8, 12, seed=3)
    for rank, context in enumerate(contexts(size)):
        layer = QKVLinear(context, 12, num_heads=4, num_kv_heads=2, head_dim=4)
        for slot, whole in (("q", q), ("k", k), ("v", v)):
            fill(layer.weight, whole, slot)
        kv_heads = max(1, 2 // size)
        kv_first = rank * 2 // size
        rows = slice(4 * kv_first, 4 * (kv_first + kv_heads))
        expected = torch.cat((q.chunk(size)[rank], k[rows], v[rows]))
        torch.testing.assert_close(layer(X), X @ expected.T)
        assert (layer.num_heads, layer.num_kv_heads) == (4 // size, kv_heads)


def test_gate_stands_before_up() -> None:
    gate, up = draw(6, 12, seed=1), draw(6, 12, seed=2)
    for rank, context in enumerate(contexts()):
        layer = GateUpLinear(context, 12, 6)
        fill(layer.weight, up, "up")
        fill(layer.weight, gate, "gate")
        expected = torch.cat((gate.chunk(2)[rank], up.chunk(2)[rank]))
        torch.testing.assert_close(layer(X), X @ expected.T)


def test_an_adapter_fits_between_gemm_and_epilogue() -> None:
    layer = ColumnParallelLinear(BuildContext(), 12, 8, bias=True)
    fill(layer.weight, draw(8, 12, seed=1))
    assert layer.bias is not None
    fill(layer.bias, draw(8, seed=2))
    torch.testing.assert_close(layer.epilogue(layer.gemm(X) + 1.0), layer(X) + 1.0)


def test_sizes_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ConfigError, match="number of outputs is 7, which 2 tensor ranks"):
        ColumnParallelLinear(contexts()[0], 12, 7)
    with pytest.raises(ConfigError, match="intermediate size is 7"):
        GateUpLinear(contexts()[0], 12, 7)
    with pytest.raises(ConfigError, match="attention heads is 3"):
        QKVLinear(contexts()[0], 12, num_heads=3, num_kv_heads=1, head_dim=4)
    with pytest.raises(ConfigError, match="3 key-value heads cannot be shared by 2"):
        local_kv_heads(3, 2)
