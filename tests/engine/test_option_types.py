"""Is every wrongly typed option of an engine refused with its name, what was given and what is allowed?

Each field of each record is tried with values of other types, so one that is added later is tried too.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from slipstream.cache.config import KvCacheConfig
from slipstream.core.errors import ConfigError
from slipstream.core.option_types import check_types
from slipstream.engine.config import EngineConfig, SchedulerConfig


def engine(**options: Any) -> EngineConfig:
    return EngineConfig(model="m", **options)


MAKERS: dict[type, Callable[..., Any]] = {
    EngineConfig: engine,
    KvCacheConfig: KvCacheConfig,
    SchedulerConfig: SchedulerConfig,
}
# A value of each kind, and something that is none.
VALUES: dict[type, Any] = {bool: True, int: 7, float: 0.5, str: "0.9", list: [1], dict: {}, object: object()}
FITTING = {bool: {bool}, int: {int}, float: {int, float}, str: {str}}


def wrong_values() -> Iterator[tuple[type, str, Any]]:
    for record in MAKERS:
        for name, hint in typing.get_type_hints(record).items():
            kinds = set(typing.get_args(hint)) or {hint}
            if Any in kinds:
                continue
            fitting = set().union(*(FITTING.get(kind, {kind}) for kind in kinds))
            for kind, value in VALUES.items():
                if kind not in fitting:
                    yield record, name, value


WRONG = list(wrong_values())


@pytest.mark.parametrize(("record", "name", "value"), WRONG, ids=lambda part: getattr(part, "__name__", None))
def test_a_wrong_type_is_refused_by_name(record: type, name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"\b{name}\b") as caught:
        MAKERS[record](**{name: value})
    assert len(str(caught.value)) < 500


def test_every_typed_field_is_tried() -> None:
    tried = {(record, name) for record, name, _ in WRONG}
    for record in MAKERS:
        hints = typing.get_type_hints(record)
        for field in dataclasses.fields(record):
            assert (record, field.name) in tried or hints[field.name] is Any, field.name


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"seed": "x"}, "seed='x' must be a whole number or None."),
        ({"gpu_memory_utilization": "0.9"}, "gpu_memory_utilization='0.9' must be a number or None."),
        ({"enable_chunked_prefill": 1}, "enable_chunked_prefill=1 must be True or False."),
        ({"revision": 3}, "revision=3 must be a string or None."),
        ({"seed": True}, "seed=True must be a whole number or None."),
    ],
    ids=str,
)
def test_what_is_said(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        engine(**options)
    assert str(caught.value) == said


def test_an_option_of_a_section_is_named_with_it() -> None:
    with pytest.raises(ConfigError) as caught:
        KvCacheConfig(tokens_per_block="32")
    assert str(caught.value) == "KvCacheConfig(tokens_per_block='32') must be a whole number."


def test_numbers_of_other_libraries_are_numbers() -> None:
    numpy = pytest.importorskip("numpy")
    assert engine(seed=numpy.int64(3)).seed == 3
    assert engine(gpu_memory_utilization=numpy.float32(0.5)).gpu_memory_utilization == 0.5


def test_a_field_of_any_type_takes_anything() -> None:
    @dataclasses.dataclass
    class Record:
        anything: Any
        maybe: int | Any

    check_types(Record(anything=object(), maybe="x"))
