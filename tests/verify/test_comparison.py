"""Does the measure of error see one wrong line, and forgive rounding of tiny ones?"""

from __future__ import annotations

import math

import pytest
import torch

from slipstream.verify.comparison import Check, relative_error


def lines(seed: int = 0) -> torch.Tensor:
    return torch.randn(100, 64, generator=torch.Generator().manual_seed(seed))


def test_equal_tensors_are_no_distance_apart() -> None:
    assert relative_error(lines(), lines()) == 0.0
    assert relative_error(torch.zeros(3, 4), torch.zeros(3, 4)) == 0.0
    assert relative_error(torch.zeros(0, 4), torch.zeros(0, 4)) == 0.0


def test_one_wrong_line_counts_in_full() -> None:
    given = lines()
    given[57] *= 1.5
    assert relative_error(given, lines()) == pytest.approx(0.5, rel=1e-5)


def test_a_tiny_line_is_held_against_the_others() -> None:
    expected = lines()
    expected[3] *= 1e-6
    given = expected.clone()
    given[3] += 1e-5
    assert relative_error(given, expected) < 1e-3


def test_nan_and_shape_never_pass() -> None:
    given = lines()
    given[0, 0] = float("nan")
    check = Check("x", "Linear", 1e-2)
    check.add(relative_error(given, lines()), 1)
    assert math.isnan(check.worst) and not check.is_good
    check.add(0.5, 2)
    assert math.isnan(check.worst) and check.forward == 1
    assert relative_error(lines()[:5], lines()) == math.inf
