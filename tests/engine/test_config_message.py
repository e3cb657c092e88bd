"""Does a configuration come out of its message equal to what went in?"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from slipstream.cache.config import KvCacheConfig
from slipstream.core.errors import ConfigError
from slipstream.engine.config import (
    CapacitySchedulerPolicy,
    ContextChunkingPolicy,
    EngineConfig,
    SchedulerConfig,
)
from slipstream.engine.config_message import config_message, read_config
from slipstream.engine.graph_config import CudaGraphConfig

CONFIGS = {
    "nothing": EngineConfig(model="m"),
    "numbers": EngineConfig(model="m.gguf", max_batch_size=3, max_seq_len=99, seed=0, dtype="float32"),
    "switches": EngineConfig(model="m", skip_tokenizer_init=True, enable_chunked_prefill=False),
    "cache": EngineConfig(
        model="m", kv_cache_config=KvCacheConfig(max_tokens=64, max_gpu_total_bytes="4GiB", dtype="auto")
    ),
    "policies": EngineConfig(
        model="m",
        scheduler_config=SchedulerConfig(
            capacity_scheduler_policy="STATIC_BATCH", context_chunking_policy="EQUAL_PROGRESS"
        ),
    ),
    "graphs": EngineConfig(model="m", cuda_graph_config=CudaGraphConfig(batch_sizes=[1, 2, 8])),
    "a scheme": EngineConfig(model="m", quantization="int8", tokenizer="folder", revision="v1"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_it_comes_out_as_it_went_in(name: str) -> None:
    config = CONFIGS[name]
    assert read_config(json.loads(json.dumps(config_message(config)))) == config


def test_members_and_paths_come_out_by_name() -> None:
    scheduling = SchedulerConfig(
        capacity_scheduler_policy=CapacitySchedulerPolicy.GUARANTEED_NO_EVICT,
        context_chunking_policy=ContextChunkingPolicy.EQUAL_PROGRESS,
    )
    config = EngineConfig(model=Path("a") / "b", tokenizer=Path("c"), scheduler_config=scheduling)
    found = read_config(json.loads(json.dumps(config_message(config))))
    assert (found.model, found.tokenizer) == (str(Path("a") / "b"), "c")
    assert found.scheduler_config is not None
    assert found.scheduler_config.capacity_policy == "GUARANTEED_NO_EVICT"
    assert found.scheduler_config.chunking_policy == "EQUAL_PROGRESS"


def test_only_what_was_said_crosses() -> None:
    assert config_message(CONFIGS["nothing"]) == {"model": "m"}


def test_what_is_in_no_file_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="tokenizer is a object, which cannot cross"):
        config_message(EngineConfig(model="m", tokenizer=object()))


def test_a_message_is_checked_as_any_configuration_is() -> None:
    with pytest.raises(ConfigError, match="has no option 'modle'"):
        read_config({"modle": "x", "model": "m"})
    with pytest.raises(ConfigError, match="max_batch_size=0"):
        read_config({"model": "m", "max_batch_size": 0})
