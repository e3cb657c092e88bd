"""What may be done to an engine between two of its steps? Look at it, forget prefixes, sleep, change weights.

Everything here is a command by name that runs on the engine's thread, in whichever process that is, so it
sees no half-done step. What takes pages or weights away waits until nothing runs; requests that come then
wait for it or, where the engine sleeps, are refused.
Invariant: a failed change leaves the engine as it was, or refusing every request with what to do.
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from slipstream.checkpoint.base import Checkpoint
from slipstream.checkpoint.dummy import DummyCheckpoint
from slipstream.checkpoint.in_memory import InMemoryCheckpoint
from slipstream.checkpoint.opening import open_checkpoint
from slipstream.core.errors import CheckpointError, ConfigError, RequestError
from slipstream.engine.assembly import Assembly
from slipstream.engine.client import Command
from slipstream.engine.config import EngineConfig
from slipstream.engine.engine import Engine
from slipstream.engine.step_records import EngineTrace
from slipstream.models.loading import fitting_tensors, load_weights
from slipstream.models.registry import model_class, read_config

logger = logging.getLogger(__name__)

ASLEEP = "The engine is asleep; call wake_up() and send the request again."
WITHOUT_WEIGHTS = (
    "The engine has no weights, since replacing them failed; call update_weights() with a checkpoint that "
    "fits, or create a new LLM."
)


class EngineControl:
    """The commands of one engine."""

    def __init__(self, assembly: Assembly, config: EngineConfig) -> None:
        self._assembly = assembly
        self._config = config
        # Where the weights of now can be read again; None where they came from memory.
        self._source: str | Path | None = config.model
        self._sleep_level = 0

    def commands(self) -> dict[str, Command]:
        """Return what this engine does by name."""
        return {
            "stats": Command(self._stats),
            "reset_prefix_cache": Command(_reset_prefix_cache),
            "kv_cache_events": Command(_kv_cache_events),
            "sleep": Command(self._sleep, when_idle=True, check=_check_sleep),
            "wake_up": Command(self._wake_up),
            "update_weights": Command(self._update_weights, when_idle=True),
            "trace": Command(_trace),
        }

    def _stats(self, engine: Engine) -> dict[str, Any]:
        scheduler = engine.scheduler
        pool, stats = scheduler.cache.pool, scheduler.stats
        seen = stats.num_cached_tokens + stats.num_planned_tokens
        return {
            **dataclasses.asdict(stats),
            **engine.runner.counters,
            "num_running": scheduler.num_running,
            "num_waiting": scheduler.num_waiting,
            "num_free_pages": pool.num_free,
            "num_pages": pool.num_usable,
            "kv_cache_usage": 1.0 - pool.num_free / pool.num_usable,
            "prefix_hit_rate": stats.num_cached_tokens / seen if seen else 0.0,
            "sleep_level": self._sleep_level,
        }

    def _sleep(self, engine: Engine, level: int = 1) -> None:
        if level == 2 and self._source is None:
            raise ConfigError(
                "sleep(level=2): the weights came from memory, so wake_up() could not read them again; use "
                "level=1, or update_weights() from a checkpoint first."
            )
        if self._sleep_level >= level:
            return
        engine.refusal = RequestError(ASLEEP, code="engine_asleep")
        engine.scheduler.cache.reset_prefix_cache()
        engine.runner.drop_pages()
        if level == 2:
            engine.runner.set_model(None)
        self._sleep_level = level
        _return_memory()

    def _wake_up(self, engine: Engine) -> None:
        if not self._sleep_level:
            return
        if not engine.runner.has_model:
            assert self._source is not None
            self._read_weights(engine, self._source)
        engine.runner.make_pages()
        self._capture(engine)
        self._sleep_level = 0
        engine.refusal = None

    def _update_weights(self, engine: Engine, source: str | Path | Mapping[str, Any]) -> None:
        if self._sleep_level:
            raise ConfigError("update_weights(): the engine is asleep; call wake_up() first.")
        self._read_weights(engine, source)
        self._capture(engine)
        engine.scheduler.cache.reset_prefix_cache()
        engine.refusal = None
        self._source = None if isinstance(source, Mapping) else source

    def _read_weights(self, engine: Engine, source: str | Path | Mapping[str, Any]) -> None:
        """Give the runner a model filled from `source`. Nothing changes before the source is seen to fit."""
        checkpoint = self._open(source)
        try:
            self._check_fits(checkpoint)
            refusal = engine.refusal
            # Two models may not fit in memory: from here on a failure leaves none.
            engine.runner.set_model(None)
            engine.refusal = refusal or RequestError(WITHOUT_WEIGHTS, code="engine_stopped")
            _return_memory()
            model = self._assembly.build_model(torch.device(self._assembly.resolved.device))
            load_weights(model, checkpoint)
            engine.runner.set_model(model)
            engine.refusal = refusal
        finally:
            checkpoint.close()

    def _capture(self, engine: Engine) -> None:
        """Capture steps over new weights or pages as at a start, before requests come."""
        try:
            engine.runner.capture_within(self._assembly.resolved.capture_budget_s)
        except Exception:
            # The engine is whole without them.
            logger.exception("steps could not be captured and run kernel by kernel")

    def _open(self, source: str | Path | Mapping[str, Any]) -> Checkpoint:
        if isinstance(source, Mapping):
            return InMemoryCheckpoint(source)
        config = self._config
        is_first = source == config.model
        return open_checkpoint(
            source,
            load_format=config.load_format if is_first else "auto",
            revision=config.revision if is_first else None,
        )

    def _check_fits(self, checkpoint: Checkpoint) -> None:
        """Raise CheckpointError unless the checkpoint is of the same model with the same configuration."""
        blank = self._assembly.build_model(torch.device("meta"))
        if not isinstance(checkpoint, InMemoryCheckpoint):
            cls = model_class(checkpoint)
            given = read_config(cls, checkpoint) if cls is type(blank) else None
            if given != blank.config:
                raise CheckpointError(
                    f"{checkpoint.path} does not fit the running model: {_difference(blank, cls, given)}. "
                    "Give a checkpoint with the same configuration, or create a new LLM."
                )
        if not isinstance(checkpoint, DummyCheckpoint):
            fitting_tensors(blank, checkpoint)


def _check_sleep(level: int = 1) -> None:
    if level not in (1, 2):
        raise ConfigError(
            f"sleep(level={level!r}): 1 frees the KV cache and keeps the weights, 2 frees both."
        )


def _reset_prefix_cache(engine: Engine) -> None:
    engine.scheduler.cache.reset_prefix_cache()


def _kv_cache_events(engine: Engine) -> list[Any]:
    """Drain the cache's events. Raises ConfigError where none are recorded."""
    return engine.scheduler.drain_kv_events()


def _trace(engine: Engine) -> EngineTrace:
    """Return what steps and requests did lately; across processes it arrives as plain data."""
    return engine.trace()


def _difference(blank: Any, cls: type, given: Any) -> str:
    if given is None:
        return f"it is a {cls.__name__}, not a {type(blank).__name__}"
    fields = [field.name for field in dataclasses.fields(given)]
    return "; ".join(
        f"{name} is {getattr(given, name)!r}, not {getattr(blank.config, name)!r}"
        for name in fields
        if getattr(given, name) != getattr(blank.config, name)
    )


def _return_memory() -> None:
    """Give freed memory back to the system: both allocators would rather keep it."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    if sys.platform == "linux":
        # glibc keeps freed blocks of some megabytes; other C libraries have no such function.
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
