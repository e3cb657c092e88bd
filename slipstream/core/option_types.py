"""Is each option of a record of the type that its field declares?

Invariant: the annotation is the one place that says it, so a field added to a record is checked too. A bool
is no number here, though Python thinks so: `max_batch_size=True` is a slip.
"""

from __future__ import annotations

import dataclasses
import functools
import numbers
import types
import typing
from typing import Any

from slipstream.core.checks import shown
from slipstream.core.errors import ConfigError

_NUMBERS: dict[type, tuple[type, str]] = {
    int: (numbers.Integral, "a whole number"),
    float: (numbers.Real, "a number"),
}
_WORDS: dict[type, str] = {bool: "True or False", str: "a string", type(None): "None"}


def check_types(record: object, *, owner: str = "") -> None:
    """Raise ConfigError for the first field whose value is not of its declared type.

    `owner` is the record's name where an option is one of a section: `Owner(name=...)`.
    """
    for name, kinds in _declared(type(record)).items():
        value = getattr(record, name)
        if kinds and not any(_is_a(value, kind) for kind in kinds):
            given = f"{owner}({name}={shown(value)})" if owner else f"{name}={shown(value)}"
            raise ConfigError(f"{given} must be {' or '.join(map(_word, kinds))}.")


@functools.cache
def _declared(record: type) -> dict[str, tuple[type, ...]]:
    """Return the types that each field takes, none where it takes any."""
    hints = typing.get_type_hints(record)
    return {field.name: _kinds(hints[field.name]) for field in dataclasses.fields(record)}


def _kinds(hint: Any) -> tuple[type, ...]:
    if hint is Any:
        return ()
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        parts = [_kinds(part) for part in typing.get_args(hint)]
        return tuple(kind for part in parts for kind in part) if all(parts) else ()
    return (hint,) if isinstance(hint, type) else ()


def _is_a(value: object, kind: type) -> bool:
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, _NUMBERS[kind][0] if kind in _NUMBERS else kind)


def _word(kind: type) -> str:
    return _NUMBERS[kind][1] if kind in _NUMBERS else _WORDS.get(kind, f"a {kind.__name__}")
