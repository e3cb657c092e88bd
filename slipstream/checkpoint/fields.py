"""Is a field of a model's configuration there, of the right type, and within bounds?

Invariant: a value that passes is of the asked type (a bool is no int, a string no number), finite, and inside
the inclusive range. Nothing is converted, except an int where a float is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeVar

from slipstream.checkpoint.weight_file import shown
from slipstream.core.errors import CheckpointError

T = TypeVar("T")


def require(
    config: Mapping[str, Any],
    key: str,
    kind: type[T],
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    where: str = "config.json",
) -> T:
    """Return `config[key]`, checked; raise CheckpointError where it is missing (or null) or wrong.

    The bounds are inclusive; for a str, list or other sized type they bound its length. `where` names the
    file, and the section in it, for the message.
    """
    value = config.get(key)
    allowed = _allowed(kind, minimum, maximum)
    if value is None:
        raise CheckpointError(
            f"{where}: field {key!r} is missing; needed: {allowed}. Add it or use a complete checkpoint."
        )
    if kind is float:
        value = _as_float(value)
    if _is_wrong(value, kind, minimum, maximum):
        raise CheckpointError(
            f"{where}: field {key!r} is {shown(value)}; allowed: {allowed}. "
            "Correct it or use another checkpoint."
        )
    return value


def optional(
    config: Mapping[str, Any],
    key: str,
    kind: type[T],
    default: T,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    where: str = "config.json",
) -> T:
    """Return `config[key]` checked as by `require`, or `default`, unchecked, where it is missing or null."""
    if config.get(key) is None:
        return default
    return require(config, key, kind, minimum=minimum, maximum=maximum, where=where)


def _as_float(value: Any) -> Any:
    """Return an int as a float; everything else as it is."""
    if not isinstance(value, int) or isinstance(value, bool):
        return value
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def _is_wrong(value: Any, kind: type[Any], minimum: float | None, maximum: float | None) -> bool:
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        return True
    if isinstance(value, float) and not math.isfinite(value):
        return True
    size = value if isinstance(value, (int, float)) else len(value)
    return (minimum is not None and size < minimum) or (maximum is not None and size > maximum)


def _allowed(kind: type[Any], minimum: float | None, maximum: float | None) -> str:
    name = "a finite float" if kind is float else f"a value of type {kind.__name__}"
    quantity = name if kind in (int, float) else f"{name} of length"
    match minimum, maximum:
        case None, None:
            return name
        case _, None:
            return f"{quantity} at least {minimum}"
        case None, _:
            return f"{quantity} at most {maximum}"
        case _:
            return f"{quantity} from {minimum} to {maximum}"
