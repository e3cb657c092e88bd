"""Does one kernel do for a lone row what rotation, cache write and attention do one after the other?"""

from __future__ import annotations

import pytest
import torch

from slipstream.kernels.rotary_decode import rotary_decode as definition
from tests.kernels.gpu.conftest import HAS_GPU, has_interpreter
from tests.kernels.test_rotary_decode import arguments

if HAS_GPU or has_interpreter():
    from slipstream.kernels.gpu import paged_decode
    from slipstream.kernels.gpu.paged_decode import LONG, choose_splits
    from slipstream.kernels.gpu.rotary_decode import rotary_decode as kernel

TOLERANCE = 2e-5


def test_contexts_that_can_be_long_are_cut_into_more_shares() -> None:
    assert choose_splits(8, LONG, sms=132) == 16
    assert choose_splits(8, LONG + 1, sms=132) == 32
    # No more programs than keep memory busy, and no shares that are too short to be one.
    assert choose_splits(64, LONG + 1, sms=132) == 8
    assert choose_splits(8, 100, sms=132) == 2


@pytest.mark.parametrize("name", ["first token", "one share", "page full", "shares", "window"])
def test_it_is_the_definition(device: str, name: str) -> None:
    check(device, name)


def test_a_step_for_long_contexts_is_the_definition(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a high bound of the context a step is cut into the most shares, of which half are used."""
    monkeypatch.setattr(paged_decode, "sms_of", lambda _: 132)
    check(device, "shares", bound=40_000)


def check(device: str, name: str, *, bound: int = 0) -> None:
    made = []
    for function in (kernel, definition):
        given = arguments(name, torch.float32, device)
        longest, *settings = given["settings"]
        given["settings"] = (max(longest, bound), *settings)
        out = function(
            given["qkv"], given["rotary"], given["position"], *given["norms"], 1e-6, given["interleaved"],
            given["heads"], given["kv"], given["slot"], given["table"], given["lens"], given["counters"],
            *given["settings"],
        )  # fmt: skip
        assert not bool(given["counters"].any())
        made.append((out, given["kv"].nan_to_num(7.0)))
    for ours, defined in zip(*made, strict=True):
        torch.testing.assert_close(ours, defined, rtol=TOLERANCE, atol=TOLERANCE)
