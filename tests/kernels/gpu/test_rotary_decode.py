"""Does one kernel do for a lone row what rotation, cache write and attention do one after the other?"""

from __future__ import annotations

import pytest
import torch

from slipstream.kernels.rotary_decode import rotary_decode as definition
from tests.kernels.gpu.conftest import HAS_GPU, has_interpreter
from tests.kernels.test_rotary_decode import arguments

if HAS_GPU or has_interpreter():
    from slipstream.kernels.gpu.rotary_decode import rotary_decode as kernel

TOLERANCE = 2e-5


@pytest.mark.parametrize("name", ["first token", "one share", "page full", "shares", "window"])
def test_it_is_the_definition(device: str, name: str) -> None:
    made = []
    for function in (kernel, definition):
        given = arguments(name, torch.float32, device)
        out = function(
            given["qkv"], given["rotary"], given["position"], *given["norms"], 1e-6, given["interleaved"],
            given["heads"], given["kv"], given["slot"], given["table"], given["lens"], given["counters"],
            *given["settings"],
        )  # fmt: skip
        assert not bool(given["counters"].any())
        made.append((out, given["kv"].nan_to_num(7.0)))
    for ours, defined in zip(*made, strict=True):
        torch.testing.assert_close(ours, defined, rtol=TOLERANCE, atol=TOLERANCE)
