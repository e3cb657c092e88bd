"""Is everything that `LLM(...)` accepts served, and everything else refused by name?"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from slipstream.cache.config import KvCacheConfig
from slipstream.core.errors import ConfigError, UnsupportedError
from slipstream.engine import config as config_module
from slipstream.engine.config import (
    CapacitySchedulerPolicy,
    ContextChunkingPolicy,
    EngineConfig,
    SchedulerConfig,
)


def make(**options: Any) -> EngineConfig:
    return EngineConfig(model="some/model", **options)


def test_defaults_ask_for_nothing() -> None:
    config = make()
    assert config.device == config.dtype == config.load_format == "auto"
    assert config.max_batch_size is config.max_num_tokens is config.max_seq_len is None
    assert config.seed is None and not config.trust_remote_code


@pytest.mark.parametrize(
    ("given", "ours"),
    [
        ("max_model_len", "max_seq_len"),
        ("max_num_seqs", "max_batch_size"),
        ("max_num_batched_tokens", "max_num_tokens"),
    ],
)
def test_names_known_from_elsewhere_mean_ours(given: str, ours: str) -> None:
    assert getattr(make(**{given: 64}), ours) == 64
    with pytest.raises(ConfigError, match=ours):
        make(**{given: 64, ours: 65})


def test_an_unknown_option_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match=r"no option 'max_batchsize'.*Did you mean 'max_batch_size'"):
        make(max_batchsize=3)


@pytest.mark.parametrize("name", sorted(config_module._NOT_SERVED))
def test_what_is_not_served_is_refused_by_name(name: str) -> None:
    value = {bool: True, int: 2}.get(type(getattr(EngineConfig, name)), "anything")
    with pytest.raises(UnsupportedError, match=f"{name}=.*not served"):
        make(**{name: value})
    make(**{name: getattr(EngineConfig, name)})


@pytest.mark.parametrize("name", sorted(config_module._CHOICES))
def test_a_choice_outside_the_list_names_the_list(name: str) -> None:
    valid = config_module._CHOICES[name]
    for value in valid:
        assert getattr(make(**{name: value}), name) == value
    with pytest.raises(ConfigError, match=f"{name}='aut0' is unknown; valid: {valid[0]}"):
        make(**{name: "aut0"})


@pytest.mark.parametrize("name", ["max_batch_size", "max_num_tokens", "max_seq_len", "stream_interval"])
@pytest.mark.parametrize("value", [0, -1, 2**31, True, 1.5, "8", float("nan")])
def test_counts_are_whole_and_positive(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"{name}=.*whole number"):
        make(**{name: value})


@pytest.mark.parametrize("value", [-1, 2**63])
def test_seeds_are_bounded(value: int) -> None:
    with pytest.raises(ConfigError, match="seed"):
        make(seed=value)
    assert make(seed=2**63 - 1).seed == 2**63 - 1


@pytest.mark.parametrize("value", [0.0, -0.1, 1.1, float("nan")])
def test_gpu_memory_utilization_is_a_share(value: float) -> None:
    with pytest.raises(ConfigError, match="gpu_memory_utilization"):
        make(gpu_memory_utilization=value)


@pytest.mark.parametrize("name", ["kv_cache_config", "scheduler_config"])
def test_sections_have_their_own_type(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} must be a"):
        make(**{name: {"max_tokens": 3}})
    make(kv_cache_config=KvCacheConfig(max_tokens=64), scheduler_config=SchedulerConfig())


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("capacity_scheduler_policy", CapacitySchedulerPolicy),
        ("context_chunking_policy", ContextChunkingPolicy),
    ],
)
def test_policies_are_known_by_name_or_member(name: str, kind: Any) -> None:
    default = getattr(SchedulerConfig(), name)
    SchedulerConfig(**{name: default})
    SchedulerConfig(**{name: default.value if isinstance(default, kind) else default})
    with pytest.raises(ConfigError, match=f"{name}='FASTEST'.* is unknown; valid: "):
        SchedulerConfig(**{name: "FASTEST"})


def test_a_configuration_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        make().seed = 3  # type: ignore[misc]
