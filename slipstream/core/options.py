"""How do option records answer to names they do not know?

`@options` turns a class into a frozen keyword-only dataclass whose constructor translates the names people
type from habit (those of `core.aliases` for that class) and raises on every other unknown name, with what to
use instead or the nearest valid one. Nothing is accepted and ignored.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, dataclass_transform

from slipstream.core.aliases import advice_on, aliases_of
from slipstream.core.errors import ConfigError, nearest

T = TypeVar("T")


@dataclass_transform(kw_only_default=True, frozen_default=True)
def options(*, aliases: Mapping[str, str] | None = None) -> Callable[[type[T]], type[T]]:
    """Make a frozen keyword-only record. `aliases` adds foreign names to those of `core.aliases`."""

    def decorate(cls: type[T]) -> type[T]:
        table = {**aliases_of(cls.__name__), **(aliases or {})}
        record = dataclasses.dataclass(frozen=True, kw_only=True)(cls)
        names = [f.name for f in dataclasses.fields(record)]  # type: ignore[arg-type]
        plain_init: Callable[..., None] = record.__init__

        def __init__(self: Any, **given: Any) -> None:
            plain_init(self, **translate(given, names, table, record.__name__))

        __init__.__doc__ = plain_init.__doc__
        record.__init__ = __init__  # type: ignore[assignment]
        return record

    return decorate


def translate(
    given: Mapping[str, Any], names: list[str], aliases: Mapping[str, str], owner: str
) -> dict[str, Any]:
    """Rename aliased keys of `given`; raise ConfigError for a key that is neither a name nor an alias."""
    known: dict[str, Any] = {}
    for key, value in given.items():
        name = aliases.get(key, key)
        if name not in names:
            advice = advice_on(owner, key)
            if advice:
                raise ConfigError(f"{owner} has no option {key!r}; {advice}")
            raise ConfigError(
                f"{owner} has no option {key!r}; valid: {', '.join(names)}.{nearest(key, [*names, *aliases])}"
            )
        if name in known:
            raise ConfigError(f"{owner} got {name!r} twice (as {key!r} too); give it once.")
        known[name] = value
    return known
