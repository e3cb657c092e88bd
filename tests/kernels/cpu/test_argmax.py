"""Does the native argmax say what its definition says, ties, infinities and NaN included?"""

from __future__ import annotations

import pytest
import torch

from slipstream.kernels.cpu.argmax import argmax, argmax_reference

INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize("cols", [1, 7, 16, 63, 1000, 4099])
@pytest.mark.parametrize("rows", [1, 2, 5, 33])
def test_random_rows(rows: int, cols: int) -> None:
    generator = torch.Generator().manual_seed(rows * cols)
    x = torch.randn(rows, cols, generator=generator)
    assert torch.equal(argmax(x), argmax_reference(x))
    # Few distinct values: nearly every row has a tie.
    x = torch.randint(-2, 2, (rows, cols), generator=generator).float()
    assert torch.equal(argmax(x), argmax_reference(x))


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ([-INF, -INF, -INF], 0),
        ([0.0, INF, INF, 1.0], 1),
        ([-INF, 3.0, -INF], 1),
        ([0.0, NAN, 5.0], -1),
        ([NAN, INF, -INF], -1),
    ],
)
@pytest.mark.parametrize("width", [0, 17, 100])
def test_special_rows(row: list[float], expected: int, width: int) -> None:
    x = torch.tensor([row + [-INF] * width, [0.0] * (len(row) + width)])
    assert argmax(x).tolist() == [expected, 0] == argmax_reference(x).tolist()
