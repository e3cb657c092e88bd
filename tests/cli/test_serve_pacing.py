"""Does a server keep streams fluent unless told otherwise?"""

from __future__ import annotations

import pytest

from slipstream.cli.serve import DEFAULT_DECODE_STRETCH, paced
from slipstream.core.errors import ConfigError
from slipstream.engine.config import SchedulerConfig


def stretch_of(options: dict[str, object], stretch: float | None) -> float | None:
    found = paced(options, stretch).get("scheduler_config")
    return found.max_decode_stretch if isinstance(found, SchedulerConfig) else None


def test_the_server_bounds_the_wait_of_streams_by_default() -> None:
    assert stretch_of({}, None) == DEFAULT_DECODE_STRETCH
    given = SchedulerConfig(context_chunking_policy="EQUAL_PROGRESS")
    kept = paced({"scheduler_config": given, "dtype": "float32"}, None)
    assert kept["dtype"] == "float32" and kept["scheduler_config"].chunking_policy == "EQUAL_PROGRESS"


def test_what_is_said_wins() -> None:
    filed = {"scheduler_config": SchedulerConfig(max_decode_stretch=5.0)}
    assert stretch_of(filed, None) == 5.0
    assert stretch_of(filed, 3.0) == 3.0
    assert stretch_of(filed, 0.0) is None
    assert stretch_of({}, 0.0) is None


def test_whole_prompts_are_left_whole() -> None:
    assert stretch_of({"enable_chunked_prefill": False}, None) is None
    with pytest.raises(ConfigError, match="max_decode_stretch"):
        paced({}, 0.5)
