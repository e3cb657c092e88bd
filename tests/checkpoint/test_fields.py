"""A configuration value passes only with the right type and inside its bounds."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from slipstream.checkpoint.fields import optional, require
from slipstream.core.errors import CheckpointError

BAD_COUNTS = [0, -1, 2**40, 10**4000, True, "8", 8.0, math.nan, [8], {"n": 8}, None]
BAD_RATES = [0.0, -1e-5, 2, 10**400, math.nan, math.inf, -math.inf, True, "1e-5", [1e-5], None]


@pytest.mark.parametrize("value", BAD_COUNTS, ids=str)
def test_a_bad_count_is_refused_by_name(value: Any) -> None:
    with pytest.raises(CheckpointError, match=r"my/config.json: field 'num_heads' .*int.* from 1 to 1024"):
        require({"num_heads": value}, "num_heads", int, minimum=1, maximum=1024, where="my/config.json")


@pytest.mark.parametrize("value", BAD_RATES, ids=lambda value: str(value)[:20])
def test_a_bad_rate_is_refused_by_name(value: Any) -> None:
    with pytest.raises(CheckpointError, match=r"field 'eps' .*finite float from 1e-12 to 1"):
        require({"eps": value}, "eps", float, minimum=1e-12, maximum=1)


def test_a_missing_field_is_not_a_wrong_one() -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: field 'num_heads' is missing"):
        require({}, "num_heads", int)


@pytest.mark.parametrize("value", [1, 1024])
def test_bounds_are_inclusive(value: int) -> None:
    assert require({"n": value}, "n", int, minimum=1, maximum=1024) == value


def test_an_integer_is_a_float_where_one_is_asked_for() -> None:
    theta = require({"theta": 10000}, "theta", float, minimum=1.0)
    assert theta == 10000.0 and type(theta) is float
    with pytest.raises(CheckpointError, match="finite float"):
        require({"theta": 10**400}, "theta", float)


def test_bounds_of_sized_types_bound_the_length() -> None:
    assert require({"names": ["a"]}, "names", list, minimum=1) == ["a"]
    assert require({"flag": False}, "flag", bool) is False
    assert require({"rope": {"theta": 1}}, "rope", dict) == {"theta": 1}
    scores = np.zeros(3, dtype=np.float32)
    assert require({"scores": scores}, "scores", np.ndarray, minimum=3, maximum=3) is scores
    with pytest.raises(CheckpointError, match="type list of length at least 1"):
        require({"names": []}, "names", list, minimum=1)
    with pytest.raises(CheckpointError, match="type str of length at most 4"):
        require({"act": "swiglu"}, "act", str, maximum=4)


def test_flags_are_only_flags() -> None:
    for value in (0, 1, "true", None):
        with pytest.raises(CheckpointError, match="'tie'"):
            require({"tie": value}, "tie", bool)


def test_optional_defaults_only_where_nothing_was_said() -> None:
    assert optional({}, "window", int, 0, minimum=1) == 0
    assert optional({"window": None}, "window", int, 0, minimum=1) == 0
    assert optional({"window": 512}, "window", int, 0, minimum=1) == 512
    with pytest.raises(CheckpointError, match="'window' is 0"):
        optional({"window": 0}, "window", int, 4096, minimum=1)
