"""Merges implied by a vocabulary, against the definition, and the cache that holds them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slipstream.text import merge_rules as module
from slipstream.text.merge_rules import merge_rules


def by_definition(pieces: list[str], priority: list[float], eligible: list[bool]) -> list[tuple[str, str]]:
    known = {piece for piece, takes_part in zip(pieces, eligible, strict=True) if takes_part}
    order = sorted(range(len(pieces)), key=lambda i: (-priority[i], i))
    return [
        (pieces[i][:n], pieces[i][n:])
        for i in order
        if pieces[i] in known
        for n in range(len(pieces[i]) - 1, 0, -1)
        if pieces[i][:n] in known and pieces[i][n:] in known
    ]


@given(
    st.lists(st.text("abc", min_size=1, max_size=5), unique=True, max_size=30),
    st.lists(st.integers(-5, 0), min_size=30, max_size=30),
    st.lists(st.booleans(), min_size=30, max_size=30),
)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_merges_follow_from_the_pieces(pieces: list[str], scores: list[int], flags: list[bool]) -> None:
    priority, eligible = [float(s) for s in scores[: len(pieces)]], flags[: len(pieces)]
    assert merge_rules(pieces, priority, eligible) == by_definition(pieces, priority, eligible)


PIECES = ["a", "b", "ab", "ba", "aba", "bab"]
PRIORITY = [0.0, -1.0, -2.0, -3.0, -4.0, -5.0]
EXPECTED = [("a", "b"), ("b", "a"), ("ab", "a"), ("a", "ba"), ("ba", "b"), ("b", "ab")]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own, used for every vocabulary however small."""
    monkeypatch.setattr(module, "MIN_CACHED_PIECES", 1)
    monkeypatch.setenv("SLIPSTREAM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tokenizers"


def derived() -> list[tuple[str, str]]:
    return merge_rules(PIECES, PRIORITY, [True] * 6)


def refuse_to_derive(*arguments: object) -> None:
    raise AssertionError("derived again although the cache holds the answer")


def test_the_second_time_comes_from_the_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert derived() == EXPECTED
    (file,) = folder.iterdir()
    assert file.stat().st_mode & 0o777 == 0o600 and folder.stat().st_mode & 0o777 == 0o700
    monkeypatch.setattr(module, "derive", refuse_to_derive)
    assert derived() == EXPECTED


def test_another_vocabulary_has_another_key(folder: Path) -> None:
    assert derived() == EXPECTED
    merge_rules(PIECES, PRIORITY[::-1], [True] * 6)
    merge_rules(PIECES, PRIORITY, [False, *[True] * 5])
    merge_rules(["a", "b", "aba", "ba", "ab", "bab"], PRIORITY, [True] * 6)
    assert len(list(folder.iterdir())) == 4


DAMAGE = {
    "empty": lambda data: b"",
    "truncated": lambda data: data[:-3],
    "one digit changed": lambda data: data.replace(b"[2,", b"[3,", 1),
    "other version": lambda data: data.replace(b'"version": 1', b'"version": 0', 1),
    "not JSON": lambda data: b"\x80\x04" + data,
    "deeply nested": lambda data: b"[" * 100_000 + b"\n",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_ignored_and_rewritten(folder: Path, damage: str) -> None:
    derived()
    (file,) = folder.iterdir()
    sound = file.read_bytes()
    broken = DAMAGE[damage](sound)
    assert broken != sound
    file.write_bytes(broken)
    assert derived() == EXPECTED
    assert file.read_bytes() == sound


def signed(file: Path, body: bytes) -> bytes:
    header = json.loads(file.read_bytes().partition(b"\n")[0])
    header["sha256"] = module.hashlib.sha256(body).hexdigest()
    return json.dumps(header).encode() + b"\n" + body


@pytest.mark.parametrize(
    "body", [b"[[99],[1]]", b"[[2],[1,1]]", b'[["x"],[1]]', b"[1,2]", b"[[2],[1],[1]]", b"{}"]
)
def test_numbers_that_make_no_sense_are_ignored(folder: Path, body: bytes) -> None:
    derived()
    (file,) = folder.iterdir()
    file.write_bytes(signed(file, body))
    assert derived() == EXPECTED


def test_a_file_that_others_can_write_is_ignored(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    derived()
    (file,) = folder.iterdir()
    file.write_bytes(signed(file, b"[[2],[1]]"))
    assert derived() == [("a", "b")]  # ours and sound as far as anyone can tell
    file.chmod(0o666)
    assert derived() == EXPECTED


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the OS has no named pipes")
def test_pipes_and_links_are_not_read(folder: Path, tmp_path: Path) -> None:
    derived()
    (file,) = folder.iterdir()
    elsewhere = tmp_path / "elsewhere.json"
    elsewhere.write_bytes(signed(file, b"[[2],[1]]"))
    file.unlink()
    file.symlink_to(elsewhere)
    assert derived() == EXPECTED
    file.unlink()
    os.mkfifo(file)
    assert derived() == EXPECTED


def test_a_folder_that_cannot_be_made_costs_nothing_but_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MIN_CACHED_PIECES", 1)
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("SLIPSTREAM_CACHE", str(tmp_path / "file" / "cache"))
    assert derived() == EXPECTED
