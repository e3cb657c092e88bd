"""Is every page in exactly one place, and is the right one handed out next? Against a naive model."""

from __future__ import annotations

import random

import pytest

from slipstream.cache.pool import NULL_PAGE, PagePool
from slipstream.core.kv_retention import DEFAULT_PRIORITY


class Model:
    """The pool's contract in plain lists: slow, and obviously right. Only `priority` may outlive a holder."""

    def __init__(self, num_pages: int) -> None:
        self.priority: dict[int, int] = {}
        self.references = dict.fromkeys(range(1, num_pages), 0)
        self.blank = set(self.references)
        self.reusable: list[int] = []  # least recently freed first
        self.keyed: set[int] = set()
        self.falling: list[tuple[int, int]] = []  # (after_step, page)
        self.retired = -1

    def take(self, pages: list[int], evicted: list[int]) -> None:
        """Follow an allocation: blank pages first, then the least recently used ones, each evicted."""
        num_blank = min(len(pages), len(self.blank))
        assert set(pages[:num_blank]) <= self.blank
        # A stable sort: of equal priority, the least recently freed first.
        order = sorted(self.reusable, key=lambda page: self.priority.get(page, DEFAULT_PRIORITY))
        assert pages[num_blank:] == evicted == order[: len(pages) - num_blank]
        self.blank -= set(pages[:num_blank])
        self.reusable = [page for page in self.reusable if page not in evicted]
        self.keyed -= set(evicted)
        for page in evicted:
            self.priority.pop(page, None)
        self.references.update(dict.fromkeys(pages, 1))

    def drop(self, page: int) -> None:
        self.references[page] -= 1
        if self.references[page] == 0 and page in self.keyed:
            self.reusable.append(page)
        elif self.references[page] == 0:
            self.blank.add(page)
            self.priority.pop(page, None)

    def retire(self, step_id: int) -> None:
        self.retired = max(self.retired, step_id)
        for after_step, page in self.falling:
            if after_step <= self.retired:
                self.drop(page)
        self.falling = [pair for pair in self.falling if pair[0] > self.retired]


@pytest.mark.parametrize("seed", range(4))
def test_pool_does_what_a_naive_model_does(seed: int) -> None:
    rng = random.Random(seed)
    evicted: list[int] = []
    pool, model = PagePool(24, on_evict=evicted.append), Model(24)
    held: list[int] = []  # one entry per reference that is not falling yet
    num_refused = num_evicted = 0
    for _ in range(3000):
        kind = rng.randrange(7)
        evicted.clear()
        if kind == 0:
            count = rng.randrange(1, 8)
            pages = pool.allocate(count)
            num_refused += pages is None
            assert (pages is None) == (count > len(model.blank) + len(model.reusable))
            model.take(pages or [], evicted)
            held += pages or []
            num_evicted += len(evicted)
        elif kind == 1 and model.keyed:
            page = rng.choice(sorted(model.keyed))
            pool.acquire([page])
            if model.references[page] == 0:
                model.reusable.remove(page)
            model.references[page] += 1
            held.append(page)
        elif kind == 2 and held:
            count = rng.randrange(1, 1 + min(4, len(held)))
            pages = [held.pop(rng.randrange(len(held))) for _ in range(count)]
            after_step = model.retired + rng.randrange(-1, 4)
            pool.release([NULL_PAGE, *pages], after_step=after_step)
            model.falling += [(after_step, page) for page in pages]
            model.retire(model.retired)
        elif kind == 3:
            step_id = model.retired + rng.randrange(-1, 3)
            pool.retire(step_id)
            model.retire(step_id)
        elif kind == 4 and held:
            page = rng.choice(held)
            pool.set_keyed(page, True)
            model.keyed.add(page)
        elif kind == 5 and model.keyed and rng.random() < 0.3:
            page = rng.choice(sorted(model.keyed))
            pool.set_keyed(page, False)
            model.keyed.discard(page)
            if page in model.reusable:
                model.reusable.remove(page)
                model.blank.add(page)
                model.priority.pop(page, None)
        elif kind == 6 and held:
            page, priority = rng.choice(held), rng.choice([0, 34, DEFAULT_PRIORITY, 36, 100])
            pool.set_retention(page, priority, None)
            model.priority[page] = priority
        pool.check()
        assert pool.num_free == len(model.blank) + len(model.reusable)
        assert pool.num_retiring == len(model.falling)
        assert [pool.references(page) for page in range(1, 24)] == list(model.references.values())
    assert num_refused > 10 and num_evicted > 50


def test_pages_come_back_only_behind_the_step_that_names_them() -> None:
    pool = PagePool(4, on_evict=lambda page: None)
    pages = pool.allocate(3)
    assert pages is not None
    pool.release(pages[:1], after_step=1)
    pool.release(pages[1:], after_step=0)
    assert (pool.num_free, pool.num_retiring) == (0, 3)
    pool.retire(0)
    assert (pool.num_free, pool.num_retiring) == (2, 1)
    pool.retire(1)
    assert (pool.num_free, pool.num_retiring) == (3, 0)
    pool.check()


def test_least_recently_used_content_goes_first() -> None:
    evicted: list[int] = []
    pool = PagePool(4, on_evict=evicted.append)
    pages = pool.allocate(3)
    assert pages is not None
    for page in pages:
        pool.set_keyed(page, True)
    for page in (pages[1], pages[0], pages[2]):
        pool.release([page], after_step=-1)
    pool.acquire([pages[1]])  # used again: now the most recent
    pool.release([pages[1]], after_step=-1)
    assert pool.allocate(3) == evicted == [pages[0], pages[2], pages[1]]


def test_a_priority_expires_with_the_time_since_the_last_use() -> None:
    now = 0.0
    evicted: list[int] = []
    pool = PagePool(4, on_evict=evicted.append, clock=lambda: now)
    pages = pool.allocate(3)
    assert pages is not None
    for page in pages:
        pool.set_keyed(page, True)
    pool.set_retention(pages[0], 80, 10.0)
    now = 100.0  # held all the while: the time counts from the release
    for page in pages:
        pool.release([page], after_step=-1)
    now = 109.0
    assert pool.allocate(1) == [pages[1]]
    now = 110.0
    assert pool.allocate(2) == [pages[0], pages[2]]


def test_a_priority_ends_with_its_content() -> None:
    pool = PagePool(3, on_evict=lambda page: None)
    pages = pool.allocate(2)
    assert pages is not None
    pool.set_retention(pages[0], 0, None)
    pool.release(pages, after_step=-1)  # blank: nothing was kept
    pages = pool.allocate(2)
    assert pages is not None
    for page in pages[::-1]:
        pool.set_keyed(page, True)
        pool.release([page], after_step=-1)
    assert pool.allocate(2) == pages[::-1]


def test_a_double_free_is_noticed() -> None:
    pool = PagePool(3, on_evict=lambda page: None)
    pages = pool.allocate(1)
    assert pages is not None
    pool.release(pages, after_step=-1)
    with pytest.raises(AssertionError, match=f"page {pages[0]} freed twice"):
        pool.release(pages, after_step=-1)


def test_a_tainted_page_is_named_once() -> None:
    pool = PagePool(5, on_evict=lambda page: None)
    pool.taint(2)
    pool.taint(3)
    assert pool.take_tainted([1, 2]) == [2]
    assert pool.take_tainted([1, 2, 3]) == [3]


def test_check_notices_a_leak() -> None:
    pool = PagePool(5, on_evict=lambda page: None)
    pool.check()
    pool._blank.pop()
    with pytest.raises(AssertionError, match="leaked"):
        pool.check()
