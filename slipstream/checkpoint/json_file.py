"""How is JSON from a model repository parsed? Bounded in bytes, values and nesting, and only to an object.

Invariant: whatever the bytes, parsing ends in a dict or in `CheckpointError`, in time and memory proportional
to the bound.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from slipstream.checkpoint.weight_file import WeightFile, damaged, shown

MAX_CONFIG_BYTES = 10 * 2**20
MAX_INDEX_BYTES = 100 * 2**20
# A few bytes of JSON cost up to a hundred in Python, and time: this bounds the values of all types together.
# The index of a model of 400,000 tensors has 2 million marks.
_MARKS = (b'"', b"{", b"[", b",")
_MAX_MARKS = 2 * 2**20


def read_json_object(
    path: str | Path, *, max_bytes: int, label: str | Path | None = None, unique_keys: bool = False
) -> dict[str, Any]:
    """Read a file of at most `max_bytes` that holds one JSON object."""
    file = WeightFile(path, label=label)
    try:
        if file.size > max_bytes:
            raise damaged(file.label, f"has {file.size} bytes; allowed: at most {max_bytes}")
        return parse_json_object(file.read_bytes(0, file.size), label=file.label, unique_keys=unique_keys)
    finally:
        file.close()


def parse_json_object(data: bytes, *, label: str, unique_keys: bool = False) -> dict[str, Any]:
    """Parse UTF-8 JSON. With `unique_keys`, an object that repeats a key raises; else the last one counts."""
    if sum(data.count(mark) for mark in _MARKS) > _MAX_MARKS:
        raise damaged(label, f"has more than {_MAX_MARKS} quotes, commas and opening brackets")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise damaged(label, f"JSON key {shown(key)} appears twice")
            found[key] = value
        return found

    try:
        value = json.loads(data.decode("utf-8-sig"), object_pairs_hook=unique if unique_keys else None)
    except RecursionError as error:
        raise damaged(label, "JSON is nested too deeply") from error
    except ValueError as error:
        raise damaged(label, f"is not valid JSON: {shown(str(error))}") from error
    if not isinstance(value, dict):
        raise damaged(label, f"holds a JSON {type(value).__name__}; an object is needed")
    return value
