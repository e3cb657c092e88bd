"""Which names, arguments, fields and defaults does the package promise? A snapshot: none changes in passing.

After a change on purpose: `SLIPSTREAM_UPDATE_SURFACE=1 pytest tests/test_api_surface.py`, and read the diff
of `tests/data/api_surface.json`.
"""

from __future__ import annotations

import dataclasses
import enum
import inspect
import json
import os
from pathlib import Path
from types import FunctionType
from typing import Any

import msgspec
import pytest

import slipstream
from slipstream.core.aliases import aliases_of
from slipstream.core.options import options
from slipstream.engine.config import EngineConfig

SNAPSHOT = Path(__file__).parent / "data" / "api_surface.json"
# What the package exports that is no class.
PLAIN = {"__version__"}


def surface() -> dict[str, Any]:
    names = sorted(set(slipstream.__all__) - PLAIN)
    classes = {name: class_surface(getattr(slipstream, name)) for name in names}
    # `LLM(**options)` takes the fields of a record that is not exported.
    return {**classes, "options of LLM": class_surface(EngineConfig)}


def class_surface(cls: type) -> dict[str, Any]:
    if issubclass(cls, enum.Enum):
        return {"members": {member.name: member.value for member in cls}}
    found: dict[str, Any] = {"bases": [base.__name__ for base in cls.__mro__[1:-1]]}
    if dataclasses.is_dataclass(cls) or issubclass(cls, msgspec.Struct):
        found["fields"] = fields_of(cls)
        found["aliases"] = aliases_of(cls.__name__)
    else:
        found["arguments"] = signature_of(cls.__init__)
    found["methods"] = {name: described(member) for name, member in members_of(cls).items()}
    return {key: value for key, value in found.items() if value}


def fields_of(cls: Any) -> dict[str, str]:
    """Return each field as "type = default", in order."""
    if dataclasses.is_dataclass(cls):
        return {f.name: field_text(f.type, f.default, f.default_factory) for f in dataclasses.fields(cls)}
    # The struct's own fields keep their annotations as they are written, in every version of Python.
    written = {
        name: note for base in reversed(cls.__mro__) for name, note in inspect.get_annotations(base).items()
    }
    infos = msgspec.structs.fields(cls)
    return {f.name: field_text(written[f.name], f.default, f.default_factory) for f in infos}


def field_text(kind: Any, default: Any, factory: Any) -> str:
    unset = {id(dataclasses.MISSING), id(msgspec.NODEFAULT)}
    if id(default) not in unset:
        return f"{kind} = {default!r}"
    return f"{kind} = made anew" if id(factory) not in unset else str(kind)


def members_of(cls: type) -> dict[str, Any]:
    """Return the public methods and properties that our own classes of the hierarchy define."""
    ours = [base for base in cls.__mro__ if base.__module__.startswith("slipstream")]
    members = {name: member for base in reversed(ours) for name, member in vars(base).items()}
    kinds = (FunctionType, property, classmethod, staticmethod)
    return {
        name: member
        for name, member in sorted(members.items())
        if isinstance(member, kinds) and not name.startswith("_")
    }


def described(member: Any) -> str:
    if isinstance(member, property):
        return "property -> " + str(inspect.get_annotations(member.fget).get("return"))  # type: ignore[arg-type]
    function = getattr(member, "__func__", member)
    kind = "async " if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function) else ""
    prefix = f"{type(member).__name__} " if function is not member else ""
    return prefix + kind + signature_of(function)


def signature_of(function: Any) -> str:
    return str(inspect.signature(function))


def test_the_surface_is_the_snapshot() -> None:
    found = surface()
    if os.environ.get("SLIPSTREAM_UPDATE_SURFACE"):
        SNAPSHOT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    assert found == json.loads(SNAPSHOT.read_text(encoding="utf-8")), (
        "the public surface changed; if on purpose, renew it as this file's docstring says"
    )


def test_every_export_is_in_the_snapshot() -> None:
    kept = json.loads(SNAPSHOT.read_text(encoding="utf-8"))
    assert set(kept) == {*slipstream.__all__, "options of LLM"} - PLAIN
    assert "max_seq_len" in kept["options of LLM"]["fields"]
    assert kept["SamplingParams"]["fields"]["max_tokens"] == "int | None = 32"
    assert kept["SamplingParams"]["aliases"]["max_new_tokens"] == "max_tokens"
    assert "sampling_params" in kept["LLM"]["methods"]["generate"]
    assert kept["CapacitySchedulerPolicy"]["members"]["MAX_UTILIZATION"] == "MAX_UTILIZATION"


@options()
class Before:
    """A record."""

    size: int = 1

    def grow(self, by: int = 1) -> int: ...


@options()
class Renamed:
    """Its field has another name."""

    length: int = 1

    def grow(self, by: int = 1) -> int: ...


@options()
class OtherDefault:
    """Its field has another default."""

    size: int = 2

    def grow(self, by: int = 1) -> int: ...


@options()
class OtherType:
    """Its field has another type."""

    size: int | None = 1

    def grow(self, by: int = 1) -> int: ...


@options()
class OtherArgument:
    """Its method takes another argument."""

    size: int = 1

    def grow(self, to: int = 1) -> int: ...


@pytest.mark.parametrize("changed", [Renamed, OtherDefault, OtherType, OtherArgument])
def test_a_change_would_be_seen(changed: type) -> None:
    # The classes of this file are none of the package's, so their methods have to be named.
    def seen(cls: type) -> tuple[Any, str]:
        return class_surface(cls), signature_of(cls.grow)  # type: ignore[attr-defined]

    assert seen(changed) != seen(Before)
    assert class_surface(Before)["fields"] == {"size": "int = 1"}
