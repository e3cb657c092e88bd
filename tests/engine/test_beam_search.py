"""Does a beam search find what it should, over any table of probabilities?

A search as wide as the whole tree is an exhaustive one, so brute force says what it must find; narrow ones
are held to what beam search promises, step by step.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence

import pytest

from slipstream.core.beam_params import BeamParams, EarlyStopping
from slipstream.core.plan import Candidates
from slipstream.engine.beam_search import BeamSearch

VOCAB, STOPS = 4, frozenset({0, 3})
PENALTIES = [-1.0, 0.0, 0.7, 1.0, 2.0]
EARLY: list[EarlyStopping] = [True, False, "never"]


def distribution(history: Sequence[int], seed: int) -> list[float]:
    """Log-probabilities of every token after a history."""
    rng = random.Random(repr((tuple(history), seed)))
    weights = [rng.expovariate(1.0) + 1e-3 for _ in range(VOCAB)]
    return [math.log(weight / sum(weights)) for weight in weights]


def after(history: Sequence[int], seed: int) -> Candidates:
    values = distribution(history, seed)
    order = sorted(range(VOCAB), key=lambda token: -values[token])
    return Candidates(order, [values[token] for token in order], list(range(1, VOCAB + 1)))


def make(width: int, *, max_tokens: int, penalty: float = 1.0, early: EarlyStopping = False) -> BeamSearch:
    beams = BeamParams(width=width, length_penalty=penalty, early_stopping=early)
    return BeamSearch(beams, max_tokens=max_tokens, stop_ids=STOPS)


def tokens_of(search: BeamSearch, count: int = 1000) -> list[list[int]]:
    return [[step.token for step in one.path()] for one in search.best(count)]


def step(search: BeamSearch, seed: int) -> list[int]:
    histories = [[one.token for one in live.path()] for live in search.live] or [[]]
    return search.advance([after(history, seed) for history in histories], [None] * len(histories))


def run(search: BeamSearch, seed: int) -> BeamSearch:
    while not search.is_done:
        step(search, seed)
    return search


def every_output(max_tokens: int, seed: int) -> list[tuple[list[int], float]]:
    """Return every output there is, with the sum of its log-probabilities."""
    found: list[tuple[list[int], float]] = []
    for length in range(1, max_tokens + 1):
        for ids in itertools.product(range(VOCAB), repeat=length):
            is_whole = ids[-1] in STOPS or length == max_tokens
            if is_whole and not STOPS.intersection(ids[:-1]):
                steps = [distribution(ids[:place], seed)[token] for place, token in enumerate(ids)]
                found.append((list(ids), sum(steps)))
    return found


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("seed", range(3))
def test_wide_enough_it_finds_the_best_of_all(penalty: float, seed: int) -> None:
    outputs = every_output(4, seed)
    outputs.sort(key=lambda pair: -pair[1] / len(pair[0]) ** penalty)
    search = run(make(len(outputs), max_tokens=4, penalty=penalty, early="never"), seed)
    assert tokens_of(search) == [ids for ids, _ in outputs]
    # Sums in another order than the search's.
    sums = [one.total for one in search.finished]
    assert sums == pytest.approx([total for _, total in outputs], abs=1e-12)


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("width", [1, 2, 3])
def test_never_stops_only_where_nothing_better_can_come(width: int, penalty: float) -> None:
    """Searched to the very end, the same hypotheses win."""
    num_early = 0
    for seed in range(20):
        search = run(make(width, max_tokens=9, penalty=penalty, early="never"), seed)
        patient = make(width, max_tokens=9, penalty=penalty, early="never")
        while patient.num_steps < 9 and (patient.live or not patient.num_steps):
            step(patient, seed)
        assert tokens_of(search, width) == tokens_of(patient, width)
        num_early += search.num_steps < patient.num_steps
    # What counts twice for its length may always be overtaken.
    assert num_early > 0 or penalty > 1.0


@pytest.mark.parametrize("early", EARLY)
@pytest.mark.parametrize("width", [1, 2, 3])
def test_each_step_keeps_the_likeliest(width: int, early: EarlyStopping) -> None:
    for seed in range(20):
        search = make(width, max_tokens=8, early=early)
        while not search.is_done:
            before = [([one.token for one in live.path()], live.total) for live in search.live] or [([], 0.0)]
            parents = step(search, seed)
            found = [
                (total + value, [*history, token])
                for history, total in before
                for token, value in enumerate(distribution(history, seed))
            ]
            found.sort(key=lambda pair: -pair[0])
            going_on = [ids for _, ids in found if ids[-1] not in STOPS][:width]
            live = [[one.token for one in live.path()] for live in search.live]
            assert live == (going_on if search.num_steps < 8 else [])
            assert [before[place][0] for place in parents] == [ids[:-1] for ids in live]
            ended = [ids for _, ids in found[:width] if ids[-1] in STOPS or search.num_steps == 8]
            assert all(search.score(one) >= search.score(search.finished[-1]) for one in search.finished)
            assert len(search.finished) == width or all(ids in tokens_of(search) for ids in ended)


def test_true_stops_with_the_first_width_that_ended() -> None:
    lengths: dict[EarlyStopping, int] = dict.fromkeys(EARLY, 0)
    for seed in range(30):
        for early in EARLY:
            search = run(make(2, max_tokens=12, penalty=1.0, early=early), seed)
            assert len(search.finished) == 2
            lengths[early] += search.num_steps
    assert lengths[True] < lengths[False] < lengths["never"]


def test_a_search_of_width_one_ends_where_greedy_does() -> None:
    for seed in range(20):
        ids: list[int] = []
        while len(ids) < 6 and not STOPS.intersection(ids[-1:]):
            ids.append(after(ids, seed).token_ids[0])
        assert tokens_of(run(make(1, max_tokens=6, early=True), seed), 1) == [ids]


def test_what_is_masked_is_never_picked() -> None:
    search = make(3, max_tokens=4)
    masked = Candidates([1, 2, 0, 3], [-0.5, -1.0, -math.inf, -math.inf], [1, 2, 3, 4])
    assert search.advance([masked], ["note"]) == [0, 0]
    assert [one.token for one in search.live] == [1, 2] and not search.finished
    assert [one.note for one in search.live] == ["note", "note"]


def test_with_nothing_left_it_is_done() -> None:
    search = make(2, max_tokens=4)
    nothing = Candidates([1, 2], [-math.inf, -math.inf], [1, 2])
    assert search.advance([nothing], [None]) == [] and search.is_done and search.best(2) == []


def test_ties_go_to_the_earlier_hypothesis_and_the_first_token() -> None:
    search = make(2, max_tokens=4)
    even = Candidates([1, 2], [math.log(0.5)] * 2, [1, 1])
    assert search.advance([even], [None]) == [0, 0]
    assert search.advance([even, even], [None, None]) == [0, 0]
    assert tokens_of(search) == [[1, 1], [1, 2]]
