"""Does the roof over the ops hold each op's plain function under its own name?"""

from __future__ import annotations

import importlib

import pytest

from slipstream.layers import functional

HOME = {"add_rms_norm": "rms_norm", "gelu_tanh_and_mul": "gelu_and_mul", "rotary_table": "rotary"}


@pytest.mark.parametrize("name", functional.__all__)
def test_each_name_is_the_kernels_own(name: str) -> None:
    home = importlib.import_module(f"slipstream.kernels.{HOME.get(name, name)}")
    assert getattr(functional, name) is getattr(home, name)
