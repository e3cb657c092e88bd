"""How does an `EngineConfig` cross to the engine's process? As plain data, only what was said.

Invariant: `read_config(config_message(config))` equals `config`, for every configuration that can cross.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from slipstream.cache.config import KvCacheConfig
from slipstream.core.errors import ConfigError
from slipstream.engine.config import EngineConfig, SchedulerConfig
from slipstream.engine.graph_config import CudaGraphConfig

SECTIONS: dict[str, type[Any]] = {
    "kv_cache_config": KvCacheConfig,
    "scheduler_config": SchedulerConfig,
    "cuda_graph_config": CudaGraphConfig,
}


def config_message(config: EngineConfig) -> dict[str, Any]:
    """Return what was said, as JSON data. Raises ConfigError for an object that is in no file."""
    said: dict[str, Any] = {}
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        value = getattr(config, field.name)
        if value is field.default or value is None:
            continue
        said[field.name] = _plain(field.name, value)
    return said


def _plain(name: str, value: Any) -> Any:
    if name in SECTIONS:
        return {
            field.name: _plain(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)
        }
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, list | tuple):
        return list(cast(Sequence[Any], value))
    if value is None or isinstance(value, str | int | float | bool):
        return value
    raise ConfigError(
        f"{name} is a {type(value).__name__}, which cannot cross to an engine in another process; give a "
        "path, or keep the engine in this process."
    )


def read_config(said: Mapping[str, Any]) -> EngineConfig:
    """Return the configuration of a message. Raises ConfigError."""
    options: dict[str, Any] = {
        name: SECTIONS[name](**value) if name in SECTIONS and value is not None else value
        for name, value in said.items()
    }
    return EngineConfig(**options)
