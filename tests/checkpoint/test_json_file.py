"""Whatever the bytes, JSON ends in a dict or in an error that names the file.

Seconds are CPU time, so that a busy machine does not fail a test.
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from slipstream.checkpoint.json_file import MAX_CONFIG_BYTES, parse_json_object, read_json_object
from slipstream.core.errors import CheckpointError


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b'{"a": 1} x', "not valid JSON"),
        (b'{"a": \xff}', "not valid JSON"),
        (b"[1]", "list"),
        (b"null", "NoneType"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "nested too deeply"),
        (b"[" * 200_000, "nested too deeply"),
        (b'{"a": [' + b"[]," * 2**20 + b"1]}", "more than 2097152"),
        (b'{"a": [' + b"0," * 2**22 + b"1]}", "more than 2097152"),
    ],
    ids=[
        "empty",
        "cut",
        "trailing",
        "utf-8",
        "list",
        "null",
        "long-int",
        "objects",
        "lists",
        "many-lists",
        "many-numbers",
    ],
)
def test_bad_json_is_refused_quickly(data: bytes, said: str) -> None:
    start = time.process_time()
    with pytest.raises(CheckpointError, match=f"some/config.json: .*{said}"):
        parse_json_object(data, label="some/config.json")
    assert time.process_time() - start < 1.0


def test_repeated_keys_are_refused_where_they_matter() -> None:
    data = b'{"a": {"b": 1, "c": 2, "b": 3}}'
    assert parse_json_object(data, label="x") == {"a": {"b": 3, "c": 2}}
    with pytest.raises(CheckpointError, match="'b' appears twice"):
        parse_json_object(data, label="x", unique_keys=True)


def test_a_late_repetition_among_many_keys_is_found_quickly() -> None:
    keys = ",".join(f'"{index}": 0' for index in range(100_000))
    start = time.process_time()
    with pytest.raises(CheckpointError, match="'99999' appears twice"):
        parse_json_object(f'{{{keys}, "99999": 0}}'.encode(), label="x", unique_keys=True)
    assert time.process_time() - start < 1.0


def test_size_is_checked_before_reading(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        file.truncate(MAX_CONFIG_BYTES + 1)
    with pytest.raises(CheckpointError, match=f"{MAX_CONFIG_BYTES + 1}.*at most {MAX_CONFIG_BYTES}"):
        read_json_object(path, max_bytes=MAX_CONFIG_BYTES)


def test_a_byte_order_mark_is_tolerated(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(b'\xef\xbb\xbf{"model_type": "llama"}')
    assert read_json_object(path, max_bytes=100) == {"model_type": "llama"}
