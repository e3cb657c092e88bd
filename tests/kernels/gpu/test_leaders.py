"""Do the kernel's leaders stand in the order of `sampling/candidates.py`?"""

from __future__ import annotations

import math

import pytest
import torch

from tests.kernels.gpu.conftest import HAS_GPU, has_interpreter

if HAS_GPU or has_interpreter():
    from slipstream.kernels.gpu.leaders import leaders


def logits(kind: str, vocab: int) -> torch.Tensor:
    x = torch.randn(4, vocab, generator=torch.Generator().manual_seed(vocab)) * 3
    if kind == "rounded":
        return x.round()
    if kind == "zeros of both signs":
        x = x.clamp(max=-1.0)
        x[:, 5::7], x[:, 3::11] = -0.0, 0.0
    elif kind == "masked":
        x[:] = -torch.inf
        x[0, 700], x[1, vocab - 1], x[2, 0] = 1.0, -2.0, 3.0
    return x


@pytest.mark.parametrize(
    ("kind", "vocab", "k"),
    [
        ("smooth", 4099, 1),
        ("smooth", 9000, 18),
        ("rounded", 4099, 5),
        ("zeros of both signs", 4099, 5),
        ("masked", 1100, 8),
    ],
)
def test_leaders_are_those_of_the_order(device: str, kind: str, vocab: int, k: int) -> None:
    x = logits(kind, vocab)
    values, ids = leaders(x.to(device), k)
    for row, line in enumerate(x.tolist()):
        order = sorted(range(vocab), key=lambda i: (-line[i], math.copysign(1.0, line[i]) < 0, i))[:k]
        assert ids[row].tolist() == order
        assert torch.equal(values[row].cpu(), x[row, order])
        assert torch.equal(values[row].cpu().signbit(), x[row, order].signbit())


def test_rows_need_not_be_adjacent(device: str) -> None:
    x = logits("smooth", 2000).to(device)
    values, ids = leaders(x[::2, :1500], 3)
    expected, expected_ids = leaders(x[::2, :1500].contiguous(), 3)
    assert torch.equal(ids, expected_ids) and torch.equal(values, expected)


def test_nan_leads_as_infinity(device: str) -> None:
    x = logits("smooth", 1000)
    x[1, 40], x[2, 77] = torch.nan, torch.inf
    values, _ = leaders(x.to(device), 2)
    assert values[:, 0].isinf().tolist() == [False, True, True, False]
    assert values[1, 0] > 0
