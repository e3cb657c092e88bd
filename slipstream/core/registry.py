"""Which implementations answer to which name?

A registry is a table of lazy `"module:Class"` strings: listing it imports nothing, and using one row imports
only that row. An unknown name raises with the valid names and the nearest match. Outsiders add rows with
`register`; a name is never silently replaced.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

from slipstream.core.errors import ConfigError, nearest


class Registry:
    """Named rows of one kind, e.g. `Registry("model architecture", {"MyModel": "package.module:Class"})`."""

    def __init__(self, kind: str, rows: dict[str, str]) -> None:
        self.kind = kind
        self._rows: dict[str, str | type[Any]] = dict(rows)

    def register(self, name: str, target: str | type[Any], *, override: bool = False) -> None:
        """Add a row; `target` is a class or `"module:Class"`. Raises ConfigError where `name` is taken."""
        if name in self._rows and not override:
            raise ConfigError(
                f"{self.kind} {name!r} is already registered; pass override=True to replace it on purpose."
            )
        self._rows[name] = target

    def get(self, name: str) -> Any:
        """Import and return the class behind `name`."""
        if name not in self._rows:
            valid = ", ".join(sorted(self._rows))
            raise ConfigError(f"Unknown {self.kind} {name!r}; valid: {valid}.{nearest(name, self._rows)}")
        target = self._rows[name]
        if isinstance(target, str):
            module, _, attribute = target.partition(":")
            return getattr(importlib.import_module(module), attribute)
        return target

    def names(self) -> list[str]:
        return sorted(self._rows)

    def __contains__(self, name: object) -> bool:
        return name in self._rows

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())
