"""Does the lowest priority go first, then the least recently used, expiry included? As a naive model does."""

from __future__ import annotations

import random

import pytest

from slipstream.cache.eviction_order import SLACK, EvictionOrder
from slipstream.core.kv_retention import DEFAULT_PRIORITY


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Model:
    """The contract as a list in the order of use: (page, priority, when it expires)."""

    def __init__(self) -> None:
        self.used: list[tuple[int, int, float]] = []

    def first(self, now: float) -> int:
        priorities = [DEFAULT_PRIORITY if expires <= now else priority for _, priority, expires in self.used]
        return self.used[priorities.index(min(priorities))][0]

    def remove(self, page: int) -> None:
        self.used = [entry for entry in self.used if entry[0] != page]


@pytest.mark.parametrize("priorities", [(35,), (0, 35, 100), (34, 35, 36), range(101)], ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_the_order_is_that_of_a_naive_model(seed: int, priorities: tuple[int, ...]) -> None:
    rng = random.Random(seed)
    clock = Clock()
    order, model = EvictionOrder(clock), Model()
    num_popped = num_late = 0
    for _ in range(4000):
        clock.now += rng.choice([0.0, 0.0, 1.0, 5.0])
        kind = rng.randrange(5)
        page = rng.randrange(40)
        if kind < 3 and page not in order:
            priority, duration = rng.choice(list(priorities)), rng.choice([None, None, 1.0, 10.0, 60.0])
            order.add(page, priority, duration)
            model.used.append((page, priority, float("inf") if duration is None else clock.now + duration))
        elif kind == 3 and page in order:
            order.remove(page)
            model.remove(page)
        elif kind == 4 and len(order):
            num_late += sum(expires <= clock.now for _, _, expires in model.used)
            expected = model.first(clock.now)
            assert order.pop() == expected
            model.remove(expected)
            num_popped += 1
        assert len(order) == len(model.used) and set(order) == {entry[0] for entry in model.used}
    assert num_popped > 300 and num_late > 300


def test_an_expired_page_keeps_its_place_in_the_order_of_use() -> None:
    clock = Clock()
    order = EvictionOrder(clock)
    order.add(1)
    order.add(2, 90, duration_s=10.0)
    order.add(3)
    order.add(4, 10, duration_s=20.0)
    clock.now = 9.9
    assert order.pop() == 4
    order.add(4, 10, duration_s=20.0)
    clock.now = 30.0  # page 4, of low priority, has risen to the default
    assert [order.pop() for _ in range(4)] == [1, 2, 3, 4]


def test_what_expires_is_forgotten_when_it_is_used_again() -> None:
    """A page used a million times within its time leaves no million entries behind."""
    clock = Clock()
    order = EvictionOrder(clock)
    order.add(0)
    for _ in range(20_000):
        order.add(1, 90, duration_s=3600.0)
        order.remove(1)
    assert len(order._expiring) <= 2 + SLACK
    for i in range(2_000):
        clock.now = 2.0 * i
        order.add(1, 90, duration_s=1.0)
        order.add(2, 0)
        clock.now += 1.0
        assert order.pop() == 2
        order.remove(1)
    assert len(order._expired) <= 2 + SLACK and list(order) == [0]
