"""Merges implied by a vocabulary, against the definition, whatever the hashes do."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slipstream.text import merge_rules as module
from slipstream.text.merge_rules import SpanHashes, merge_rules


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


PIECES = st.lists(st.text("ab\U0001f600", min_size=1, max_size=5), unique=True, max_size=30)
SCORES = st.lists(st.integers(-5, 0).map(float), min_size=30, max_size=30)
FLAGS = st.lists(st.booleans() | st.just(True), min_size=30, max_size=30)


@given(PIECES, SCORES, FLAGS)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_merges_follow_from_the_pieces(pieces: list[str], scores: list[float], flags: list[bool]) -> None:
    priority, eligible = scores[: len(pieces)], flags[: len(pieces)]
    assert merge_rules(pieces, priority, eligible) == by_definition(pieces, priority, eligible)


def test_the_order_in_words() -> None:
    pieces = ["a", "b", "ab", "ba", "aba", "bab"]
    expected = [("a", "b"), ("b", "a"), ("ab", "a"), ("a", "ba"), ("ba", "b"), ("b", "ab")]
    assert merge_rules(pieces, [0.0, -1.0, -2.0, -3.0, -4.0, -5.0], [True] * 6) == expected
    assert merge_rules(pieces, [0.0] * 6, [True] * 6) == expected
    assert merge_rules(pieces, [0.0] * 5 + [1.0], [True] * 6)[:2] == [("ba", "b"), ("b", "ab")]
    assert merge_rules(pieces, [0.0] * 6, [False] + [True] * 5) == [("ba", "b"), ("b", "ab")]
    assert merge_rules([], [], []) == merge_rules(["ab"], [0.0], [False]) == []


class CollidingHashes(SpanHashes):
    def of(self, starts: Any, stops: Any) -> Any:
        return super().of(starts, stops) & np.uint64(3)


@given(PIECES, SCORES, FLAGS)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_collisions_change_nothing(pieces: list[str], scores: list[float], flags: list[bool]) -> None:
    priority, eligible = scores[: len(pieces)], flags[: len(pieces)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "SpanHashes", CollidingHashes)
        assert merge_rules(pieces, priority, eligible) == by_definition(pieces, priority, eligible)


def test_equal_spans_have_equal_hashes_wherever_they_stand() -> None:
    text = "abcabdabc" * 50
    hashes = SpanHashes(np.frombuffer(text.encode("utf-32-le"), dtype="<u4"))
    starts = np.arange(len(text) - 3)
    seen: dict[int, set[str]] = {}
    for start, value in zip(starts.tolist(), hashes.of(starts, starts + 3).tolist(), strict=True):
        seen.setdefault(value, set()).add(text[start : start + 3])
    assert all(len(spans) == 1 for spans in seen.values())
    assert len(seen) == len({text[start : start + 3] for start in starts.tolist()})
