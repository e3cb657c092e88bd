"""Does a retention record refuse what makes no sense, and name the right priority for every block?"""

from __future__ import annotations

from typing import Any

import pytest

from slipstream import KvCacheRetentionConfig, TokenRangeRetentionConfig
from slipstream.core.errors import ConfigError
from slipstream.core.kv_retention import MAX_RANGES


def span(start: int, end: int | None, priority: int = 50, **more: Any) -> TokenRangeRetentionConfig:
    return TokenRangeRetentionConfig(token_start=start, token_end=end, priority=priority, **more)


def test_a_block_counts_with_the_range_of_its_first_token() -> None:
    config = KvCacheRetentionConfig(
        token_range_retention_configs=[span(64, None, 10), span(8, 24, 90, duration_ms=500)],
        decode_retention_priority=3,
        decode_duration_ms=2000,
    )
    found = [config.of_token(position, 80) for position in (0, 7, 8, 23, 24, 64, 79, 80, 500)]
    kept, tail, decoded = (90, 0.5), (10, None), (3, 2.0)
    assert found == [None, None, kept, kept, None, tail, tail, decoded, decoded]


def test_nothing_said_is_the_default() -> None:
    assert KvCacheRetentionConfig().of_token(0, 10) is None
    assert KvCacheRetentionConfig().of_token(10, 10) == (35, None)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"start": -1}, "token_start"),
        ({"start": 1.0}, "token_start"),
        ({"start": 5, "end": 5}, "token_end"),
        ({"end": 2**31}, "token_end"),
        ({"priority": 101}, "priority"),
        ({"priority": -1}, "priority"),
        ({"priority": True}, "priority"),
        ({"duration_ms": 0}, "duration_ms"),
        ({"duration_ms": float("nan")}, "duration_ms"),
        ({"duration_ms": 1e18}, "duration_ms"),
    ],
)
def test_a_range_out_of_bounds_is_refused(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=rf"TokenRangeRetentionConfig\({named}="):
        span(**({"start": 0, "end": 10} | changes))


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        ([span(0, 10), span(9, 20)], "from token 0 and from 9 overlap"),
        ([span(30, 40), span(0, None)], "from token 0 and from 30 overlap"),
        ("ranges", "must be a list of at most"),
        ([{"token_start": 0}], "must be a list of at most"),
        ([span(i, i + 1) for i in range(MAX_RANGES + 1)], "must be a list of at most"),
    ],
)
def test_ranges_that_make_no_sense_are_refused(ranges: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        KvCacheRetentionConfig(token_range_retention_configs=ranges)


def test_what_the_caller_changes_later_changes_nothing() -> None:
    ranges = [span(0, 10)]
    config = KvCacheRetentionConfig(token_range_retention_configs=ranges)
    ranges.clear()
    assert config.of_token(0, 10) == (50, None)


@pytest.mark.parametrize(
    "options", [{"decode_retention_priority": 101}, {"decode_duration_ms": -1}, {"decode_priority": 1}]
)
def test_wrong_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="KvCacheRetentionConfig"):
        KvCacheRetentionConfig(**options)
