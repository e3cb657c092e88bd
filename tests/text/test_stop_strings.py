"""Stop strings against a character-by-character definition, at every split, and linear for hostile stops."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slipstream.text.stop_strings import StopMatcher


def by_definition(text: str, stops: list[str], *, include_stop: bool) -> tuple[str, str | None]:
    """Grow the text by one character until it ends with a stop; the longest such stop is cut."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return (text[:end] if include_stop else text[: end - len(stop)]), stop
    return text, None


def fed(chunks: list[str], stops: list[str], *, include_stop: bool = False) -> tuple[list[str], str | None]:
    matcher = StopMatcher(stops, include_stop=include_stop)
    released: list[str] = []
    for chunk in chunks:
        text, stop = matcher.feed(chunk)
        released.append(text)
        if stop is not None:
            return released, stop
    return [*released, matcher.flush()], None


CASES = [
    ("Hello STOP world", ["STOP"]),
    ("ab STO STOP", ["STOP"]),
    ("aaab", ["aab"]),
    ("xabcy", ["abc", "b"]),
    ("xabcy", ["c", "bc", "abc"]),
    ("no stop he", ["here"]),
    ("ababac", ["abac"]),
    ("line\n\nnext", ["\n\n", "\n"]),
    ("日本語です", ["語で"]),
    ("", ["a"]),
    ("nothing to find", []),
]


@pytest.mark.parametrize("include_stop", [False, True])
@pytest.mark.parametrize(("text", "stops"), CASES)
def test_every_split_gives_the_same_text(text: str, stops: list[str], include_stop: bool) -> None:
    expected = by_definition(text, stops, include_stop=include_stop)
    for num_cuts in range(3):
        for cuts in itertools.combinations(range(1, len(text)), num_cuts):
            edges = [0, *cuts, len(text)]
            chunks = [text[a:b] for a, b in itertools.pairwise(edges)]
            released, stop = fed(chunks, stops, include_stop=include_stop)
            assert ("".join(released), stop) == expected
    released, stop = fed(list(text), stops, include_stop=include_stop)
    assert ("".join(released), stop) == expected


@given(st.text("ab", max_size=24), st.lists(st.text("ab", min_size=1, max_size=5), max_size=4), st.booleans())
@settings(max_examples=400, deadline=None, derandomize=True)
def test_any_text_over_two_letters(text: str, stops: list[str], include_stop: bool) -> None:
    expected = by_definition(text, stops, include_stop=include_stop)
    released, stop = fed(list(text), stops, include_stop=include_stop)
    assert ("".join(released), stop) == expected


@given(st.text("ab", max_size=20), st.lists(st.text("ab", min_size=1, max_size=6), min_size=1, max_size=3))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_no_more_is_held_than_could_begin_a_stop(text: str, stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    shown = ""
    for end, character in enumerate(text, start=1):
        released, stop = matcher.feed(character)
        shown += released
        if stop is not None:
            return
        held = text[len(shown) : end]
        beginnings = {stop[:n] for stop in stops for n in range(len(stop))}
        assert held == max((b for b in beginnings if text[:end].endswith(b)), key=len)


def test_text_after_the_stop_is_dropped() -> None:
    matcher = StopMatcher(["END"])
    assert matcher.feed("a END b") == ("a ", "END")
    assert matcher.feed("more") == ("", "END")
    assert matcher.flush() == ""


def test_a_false_prefix_is_released_by_flush() -> None:
    matcher = StopMatcher(["</tool>"])
    assert matcher.feed("x </to") == ("x ", None)
    assert matcher.flush() == "</to"
    assert matcher.flush() == ""


@pytest.mark.parametrize(
    ("stops", "unit"),
    [
        (["a" * 1023 + "b"], "a"),
        (["a" * n + "b" for n in range(1, 65)], "a"),
        (["ab" * 511 + "c"], "ab"),
        (["a" * 1000 + "b" + "a" * 20], "a" * 999 + "c"),
    ],
)
def test_hostile_stops_cost_two_moves_a_character_at_most(stops: list[str], unit: str) -> None:
    matcher = StopMatcher(stops)
    before = matcher._automaton.num_moves
    text = (unit * 20_000)[:20_000]
    for start in range(0, len(text), 7):
        assert matcher.feed(text[start : start + 7])[1] is None
    # Each failure move undoes a forward move, so there are at most as many of the one as of the other.
    assert matcher._automaton.num_moves - before <= 2 * len(text)


def test_building_is_linear_in_the_length_of_the_stops() -> None:
    stops = [chr(97 + i % 26) * 1000 + str(i) for i in range(64)]
    total = sum(map(len, stops))
    assert StopMatcher(stops)._automaton.num_moves <= 2 * total


@pytest.mark.parametrize("cut", range(7))
def test_what_is_skipped_may_begin_a_stop_but_not_end_one(cut):
    text, stops = "abcabd", ["abc", "cab", "bd"]
    matcher = StopMatcher(stops)
    early = matcher.skip(text[:cut])
    released, stop = matcher.feed(text[cut:])
    # The first stop that is complete beyond the cut.
    ends = {3: "abc", 5: "cab", 6: "bd"}
    expected = next((place for place in ends if place > cut), None)
    if expected is None:
        assert stop is None and early + released + matcher.flush() == text
    else:
        assert stop == ends[expected]
        assert early + released == text[: expected - len(stop)]
