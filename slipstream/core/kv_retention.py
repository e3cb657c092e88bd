"""How long is the cached content of a request worth keeping? Names as in TensorRT-LLM.

Priorities run from 0 to 100: content of the lowest is evicted first, then the least recently used. Here,
because a `Request` carries the record to the cache; it is checked where it is made.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from typing import Any, cast

from slipstream.core.errors import ConfigError
from slipstream.core.options import options

DEFAULT_PRIORITY = 35
MAX_PRIORITY = 100
MAX_DURATION_MS = 30 * 24 * 3600 * 1000
MAX_TOKEN = 2**31 - 1
MAX_RANGES = 256


@options()
class TokenRangeRetentionConfig:
    """Priority of the prompt's tokens from `token_start` up to `token_end` (None: to the prompt's end).

    After `duration_ms` without use the priority is the default again; None keeps it.
    """

    token_start: int
    token_end: int | None = None
    priority: int
    duration_ms: float | None = None

    def __post_init__(self) -> None:
        owner = type(self).__name__
        _check_integer(owner, "token_start", self.token_start, 0, MAX_TOKEN)
        if self.token_end is not None:
            _check_integer(owner, "token_end", self.token_end, self.token_start + 1, MAX_TOKEN)
        _check_integer(owner, "priority", self.priority, 0, MAX_PRIORITY)
        _check_duration(owner, "duration_ms", self.duration_ms)


@options()
class KvCacheRetentionConfig:
    """Priorities of what one request leaves in the cache.

    A block of the prompt counts with the range that holds its first token. Blocks that start in generated
    tokens have `decode_retention_priority`, for `decode_duration_ms` after their last use. A block that no
    range names is new content of the default priority, 35; one that other requests left keeps its own.
    """

    token_range_retention_configs: Sequence[TokenRangeRetentionConfig] = ()
    decode_retention_priority: int = DEFAULT_PRIORITY
    decode_duration_ms: float | None = None

    def __post_init__(self) -> None:
        owner = type(self).__name__
        _check_integer(owner, "decode_retention_priority", self.decode_retention_priority, 0, MAX_PRIORITY)
        _check_duration(owner, "decode_duration_ms", self.decode_duration_ms)
        given: Sequence[Any] = self.token_range_retention_configs
        is_list = isinstance(cast(object, given), list | tuple) and len(given) <= MAX_RANGES
        if not is_list or not all(isinstance(item, TokenRangeRetentionConfig) for item in given):
            raise ConfigError(
                f"{owner}(token_range_retention_configs=...) must be a list of at most {MAX_RANGES} "
                "TokenRangeRetentionConfig."
            )
        # Frozen in order and in a tuple of our own, so that no caller changes it while the request runs.
        ranges = tuple(sorted(self.token_range_retention_configs, key=lambda item: item.token_start))
        for before, after in itertools.pairwise(ranges):
            if before.token_end is None or before.token_end > after.token_start:
                raise ConfigError(
                    f"{owner}: the ranges from token {before.token_start} and from {after.token_start} "
                    "overlap; give each token one priority."
                )
        object.__setattr__(self, "token_range_retention_configs", ranges)

    def of_token(self, position: int, num_prompt: int) -> tuple[int, float | None] | None:
        """Return (priority, seconds or None) of the block that starts at `position`; None: not named."""
        if position >= num_prompt:
            return self.decode_retention_priority, _seconds(self.decode_duration_ms)
        ranges = self.token_range_retention_configs
        idx = bisect.bisect_right(ranges, position, key=lambda item: item.token_start) - 1
        if idx < 0:
            return None
        found, end = ranges[idx], ranges[idx].token_end
        return (found.priority, _seconds(found.duration_ms)) if end is None or position < end else None


def _seconds(duration_ms: float | None) -> float | None:
    return None if duration_ms is None else duration_ms / 1000


def _check_integer(owner: str, name: str, given: Any, low: int, high: int) -> None:
    is_integer = isinstance(given, int) and not isinstance(given, bool)
    if not is_integer or not low <= given <= high:
        raise ConfigError(f"{owner}({name}={given!r}) must be a whole number from {low} to {high}.")


def _check_duration(owner: str, name: str, given: Any) -> None:
    if given is None:
        return
    is_number = isinstance(given, int | float) and not isinstance(given, bool)
    if not is_number or not 0 < given <= MAX_DURATION_MS:
        raise ConfigError(
            f"{owner}({name}={given!r}) must be a number of milliseconds above 0, at most {MAX_DURATION_MS}, "
            "or None to keep the priority."
        )
