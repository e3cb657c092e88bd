"""Is a backend chosen for what it can do, and refused for what it cannot?"""

from __future__ import annotations

import dataclasses
import re

import pytest

from slipstream.attention.base import AttentionCapability
from slipstream.attention.registry import (
    BACKENDS,
    PREFERENCE,
    DeviceFacts,
    choose_backend,
    find_obstacle,
)
from slipstream.core.cache_group import CacheGroup
from slipstream.core.errors import ConfigError

FULL = CacheGroup(layers=(0, 2), kind="full", heads=2, head_dim=64)
WINDOW = CacheGroup(layers=(1,), kind="window", heads=2, head_dim=64, window=8)


@pytest.mark.parametrize("device", ["cpu", "cuda", "cuda:1"])
def test_auto_gives_a_backend_and_its_reason(device: str) -> None:
    backend, reason = choose_backend("auto", device, [FULL, WINDOW])
    assert backend.capability.window
    expected = {"cpu": "'cpu'", "cuda": "'triton'"}[device.partition(":")[0]]
    assert expected in reason and device.partition(":")[0] in reason


def test_a_name_is_used_or_refused() -> None:
    backend, reason = choose_backend("torch", "cpu", [FULL])
    assert type(backend).__name__ == "TorchReference" and "by name" in reason
    with pytest.raises(ConfigError, match=r"'torhc'; valid: .*Did you mean 'torch'"):
        choose_backend("torhc", "cpu", [FULL])


def test_a_kind_that_nobody_serves_is_refused() -> None:
    latent = dataclasses.replace(FULL, kind="latent")
    with pytest.raises(ConfigError, match="layer 0 needs latent"):
        choose_backend("torch", "cpu", [latent])
    with pytest.raises(ConfigError, match="No attention backend serves"):
        choose_backend("auto", "cpu", [latent])


@pytest.mark.parametrize(
    ("capability", "device", "match"),
    [
        (AttentionCapability(devices=frozenset({"cuda"})), "cpu", "runs on cuda, not on cpu"),
        (AttentionCapability(), "cpu", "layer 1 needs window"),
        (AttentionCapability(window=True, head_dims=frozenset({128})), "cpu", r"head sizes \[128\]"),
        (AttentionCapability(window=True, page_sizes=frozenset({16})), "cpu", "32 are set"),
        (AttentionCapability(window=True), "cpu", "^$"),
    ],
)
def test_the_first_unmet_demand_is_named(capability: AttentionCapability, device: str, match: str) -> None:
    groups = [dataclasses.replace(group, block_tokens=32) for group in (FULL, WINDOW)]
    assert re.search(match, find_obstacle(capability, device, groups))


def test_every_preferred_name_is_a_row() -> None:
    assert set(PREFERENCE) <= set(BACKENDS.names())


H100 = DeviceFacts(device="cuda", sm=90, dtype="bfloat16")


@pytest.mark.parametrize(
    ("changes", "group", "match"),
    [
        ({"sm": 75}, FULL, r"compute capability 8\.0, and this GPU has 7\.5"),
        ({"has_triton": False}, FULL, "needs triton, which is not installed"),
        ({"dtype": "float8_e4m3fn"}, FULL, "bfloat16, float16, float32, not float8_e4m3fn"),
        ({}, dataclasses.replace(FULL, head_dim=100), r"\[8, 16, ..., 256\], and this model has 100"),
        ({"device": "cpu"}, FULL, "runs on cuda, not on cpu"),
    ],
)
def test_the_gpu_backend_is_passed_over_or_refused_with_its_reason(changes, group, match) -> None:
    facts = dataclasses.replace(H100, **changes)
    is_served = facts.dtype != "float8_e4m3fn"
    if is_served:
        backend, reason = choose_backend("auto", facts, [group])
        assert "'torch'" in reason
        assert type(backend).__name__ == "TorchReference"
        # What runs on another kind of device was never a candidate.
        assert bool(re.search(match, reason)) == (facts.kind == "cuda")
    with pytest.raises(ConfigError, match=match) as refused:
        choose_backend("triton", facts, [group])
    assert ("Use 'torch'" in str(refused.value)) == is_served


def test_a_gpu_gets_its_own_backend() -> None:
    backend, reason = choose_backend("auto", H100, [FULL, WINDOW])
    assert "'triton'" in reason and backend.capability.graph
