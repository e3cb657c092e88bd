"""What can be said of a running engine that does not change? Plain data, so that it crosses to every door."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from slipstream import __version__
from slipstream.core.limits import Limits
from slipstream.engine.config import EngineConfig

if TYPE_CHECKING:
    from slipstream.engine.assembly import Assembly


class TokenizerSource(msgspec.Struct, frozen=True, kw_only=True):
    """Where another process finds the same tokenizer, in the words of `EngineConfig`."""

    model: str
    tokenizer: str | None = None
    load_format: str = "auto"
    revision: str | None = None

    def config(self) -> EngineConfig:
        """Return a configuration that names the same tokenizer."""
        return EngineConfig(
            model=self.model, tokenizer=self.tokenizer, load_format=self.load_format, revision=self.revision
        )


class EngineInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What does not change while an engine runs.

    `num_pages` are those that requests can use. `report` says in lines what was chosen and why;
    `default_sampling` is what the model's publisher recommends, by the names of `SamplingParams`. `seed`
    seeds the requests that bring none; a streaming sample is shown every `stream_interval` tokens.
    `tokenizer` is None where the engine was started without one.
    """

    model: str
    version: str
    limits: Limits
    max_batch_size: int
    max_num_tokens: int
    num_pages: int
    tokens_per_block: int
    device: str
    dtype: str
    quantization: str
    report: list[str]
    default_sampling: dict[str, float]
    tokenizer: TokenizerSource | None = None
    seed: int | None = None
    stream_interval: int = 1


def info_of(assembly: Assembly, config: EngineConfig) -> EngineInfo:
    """Return the facts of an engine that is ready."""
    resolved = assembly.resolved
    return EngineInfo(
        model=str(config.model),
        version=__version__,
        limits=assembly.limits,
        max_batch_size=resolved.max_batch_size,
        max_num_tokens=resolved.max_num_tokens,
        num_pages=assembly.capacity.num_pages - 1,
        tokens_per_block=resolved.kv_cache.tokens_per_block,
        device=resolved.device,
        dtype=resolved.dtype,
        quantization=resolved.quantization,
        report=assembly.report,
        default_sampling=assembly.default_sampling,
        tokenizer=None if assembly.tokenizer is None else _tokenizer_source(config),
        seed=config.seed,
        stream_interval=config.stream_interval,
    )


def _tokenizer_source(config: EngineConfig) -> TokenizerSource | None:
    """Return None for a tokenizer that is an object: it is in no file that another process could read."""
    given = config.tokenizer
    if given is not None and not isinstance(given, str | Path):
        return None
    return TokenizerSource(
        model=str(config.model),
        tokenizer=None if given is None else str(given),
        load_format=config.load_format,
        revision=config.revision,
    )
