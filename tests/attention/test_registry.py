"""Is a backend chosen for what it can do, and refused for what it cannot?"""

from __future__ import annotations

import dataclasses
import re

import pytest

from slipstream.attention.base import AttentionCapability
from slipstream.attention.registry import BACKENDS, PREFERENCE, choose_backend, find_obstacle
from slipstream.core.cache_group import CacheGroup
from slipstream.core.errors import ConfigError

FULL = CacheGroup(layers=(0, 2), kind="full", heads=2, head_dim=64)
WINDOW = CacheGroup(layers=(1,), kind="window", heads=2, head_dim=64, window=8)


@pytest.mark.parametrize("device", ["cpu", "cuda", "cuda:1"])
def test_auto_gives_a_backend_and_its_reason(device: str) -> None:
    backend, reason = choose_backend("auto", device, [FULL, WINDOW])
    assert backend.capability.window
    assert "'torch'" in reason and device.partition(":")[0] in reason


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
