"""Does everyone who waits for a promised block come back exactly once?"""

from __future__ import annotations

import random

import pytest

from slipstream.cache.promises import Promises


def test_a_waiter_comes_back_when_its_key_ends() -> None:
    promises: Promises[str] = Promises()
    promises.add([b"a", b"b"])
    promises.park(b"b", "waiter")
    assert b"a" in promises and promises.num_parked == 1
    assert promises.end([b"a"]) == []
    assert promises.end([b"b"]) == ["waiter"]
    assert b"b" not in promises and promises.num_parked == 0


def test_a_key_that_two_promise_ends_with_the_second() -> None:
    promises: Promises[str] = Promises()
    promises.add([b"a"])
    promises.add([b"a"])
    promises.park(b"a", "waiter")
    # Whoever writes it first serves the waiter; the other's promise still stands.
    assert promises.end([b"a"]) == ["waiter"]
    assert b"a" in promises
    assert promises.end([b"a"]) == []
    assert b"a" not in promises


def test_nobody_parks_on_what_nobody_promised() -> None:
    with pytest.raises(AssertionError, match="nobody promised"):
        Promises[str]().park(b"a", "waiter")


def test_random_traffic_loses_nobody() -> None:
    rng = random.Random(2)
    promises: Promises[int] = Promises()
    owners: list[list[bytes]] = []
    parked: set[int] = set()
    for number in range(3000):
        if rng.random() < 0.3:
            keys = [bytes([rng.randrange(20)]) for _ in range(rng.randrange(1, 5))]
            promises.add(keys)
            owners.append(keys)
        elif rng.random() < 0.5 and owners:
            promises.park(rng.choice(rng.choice(owners)), number)
            parked.add(number)
        elif owners:
            freed = promises.end(owners.pop(rng.randrange(len(owners))))
            assert len(set(freed)) == len(freed) and parked.issuperset(freed)
            parked.difference_update(freed)
        assert promises.num_parked == len(parked)
        assert sorted(promises.parked()) == sorted(parked)
        assert all(key in promises for keys in owners for key in keys)
    for keys in owners:
        parked.difference_update(promises.end(keys))
    assert not parked and not promises._owners and not promises._parked
