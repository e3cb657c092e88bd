"""Does the index find exactly what was inserted and not evicted? Against a naive model over one pool."""

from __future__ import annotations

import dataclasses
import random

import pytest

from slipstream.cache.keys import TOKEN_BYTES, block_key, chain_keys, content_of, tokens_of
from slipstream.cache.pool import NULL_PAGE, PagePool
from slipstream.cache.prefix_index import MAX_SCANNED_CHILDREN, PrefixIndex

ROOT = b"root"
GROUPS = 2
BLOCK = 4


@dataclasses.dataclass
class Entry:
    parent: bytes
    tokens: tuple[int, ...]
    pages: list[int]
    step_id: int


def forget(model: dict[bytes, Entry], page: int) -> None:
    for key, entry in list(model.items()):
        entry.pages = [NULL_PAGE if held == page else held for held in entry.pages]
        if not any(entry.pages):
            del model[key]


def common(left: tuple[int, ...], right: tuple[int, ...]) -> int:
    pairs = list(zip(left, right, strict=False))
    return next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))


def check_partial(index: PrefixIndex, model: dict[bytes, Entry], rng: random.Random, step_id: int) -> None:
    parent = rng.choice([ROOT, *model])
    wanted = tuple(rng.randrange(2) for _ in range(BLOCK))
    before = rng.randrange(step_id + 2)
    node, length = index.longest_partial(parent, content_of(wanted), before_step=before)
    lengths = [
        common(entry.tokens, wanted)
        for entry in model.values()
        if entry.parent == parent and NULL_PAGE not in entry.pages and entry.step_id < before
    ]
    assert length == max(lengths, default=0)
    assert (node is None) == (length == 0)
    if node is not None:
        assert (
            common(tuple(tokens_of(node.content)), wanted) == length
            and node.step_id < before
            and node.parent == parent
        )


@pytest.mark.parametrize("seed", range(4))
def test_index_finds_what_a_naive_model_finds(seed: int) -> None:
    """Blocks of two tokens' alphabet: at most 16 children each, all of which are scanned."""
    rng = random.Random(seed)
    model: dict[bytes, Entry] = {}
    index = PrefixIndex(GROUPS)
    evictions: list[int] = []

    def evict(page: int) -> None:
        evictions.append(page)
        index.forget_page(page)
        forget(model, page)

    pool = PagePool(40, on_evict=evict)
    held: list[int] = []
    deepest = 0
    for step_id in range(1500):
        kind = rng.randrange(4)
        pages = pool.allocate(GROUPS) if kind < 2 else None
        if pages is not None:
            held += pages
            parent = rng.choice([ROOT, ROOT, *model])
            tokens = tuple(rng.randrange(2) for _ in range(BLOCK))
            key = block_key(parent, content_of(tokens))
            if rng.random() < 0.2:
                pages[rng.randrange(GROUPS)] = NULL_PAGE  # behind this group's window
            index.insert(
                key=key, parent=parent, content=content_of(tokens), pages=pages, step_id=step_id, pool=pool
            )
            entry = model.setdefault(key, Entry(parent, tokens, [NULL_PAGE] * GROUPS, step_id))
            for group, page in enumerate(pages):
                if page != NULL_PAGE and entry.pages[group] == NULL_PAGE:
                    entry.pages[group] = page
                    entry.step_id = step_id
            deepest = max(deepest, len(model))
        elif kind == 2 and held:
            rng.shuffle(held)
            pool.release([held.pop() for _ in range(min(len(held), 3))], after_step=-1)
        elif kind == 3 and held and rng.random() < 0.3:
            page = rng.choice(held)
            index.withdraw([page], pool)
            forget(model, page)
        pool.check()
        assert len(index) == len(model)
        for key, entry in model.items():
            node = index.get(key)
            assert node is not None and node.pages == entry.pages and node.step_id == entry.step_id
        check_partial(index, model, rng, step_id)
    assert len(evictions) > 100 and deepest > 10
    index.clear(pool)
    pool.release(held, after_step=-1)
    assert len(index) == 0 and not index._children and not index._node_of_page
    evictions.clear()
    assert pool.allocate(39) is not None and not evictions  # nothing was worth keeping


def test_a_group_keeps_the_page_it_has() -> None:
    evicted: list[int] = []
    pool = PagePool(10, on_evict=evicted.append)
    pages = pool.allocate(4)
    assert pages is not None
    index = PrefixIndex(GROUPS)
    options = {"key": b"k", "parent": ROOT, "content": content_of((1, 2)), "pool": pool}
    index.insert(pages=[pages[0], NULL_PAGE], step_id=3, **options)
    node = index.insert(pages=pages[2:], step_id=5, **options)
    assert node.pages == [pages[0], pages[3]] and node.step_id == 5
    pool.release(pages, after_step=-1)
    pool.allocate(9)
    assert evicted == [pages[0], pages[3]]  # the other two held nothing that could be found


def test_a_page_of_a_running_step_is_never_copied() -> None:
    pool = PagePool(4, on_evict=lambda page: None)
    pages = pool.allocate(1)
    assert pages is not None
    index = PrefixIndex(1)
    index.insert(key=b"k", parent=ROOT, content=content_of((1, 2, 3)), pages=pages, step_id=7, pool=pool)
    assert index.longest_partial(ROOT, content_of((1, 2, 9)), before_step=7) == (None, 0)
    assert index.longest_partial(ROOT, content_of((1, 2, 9)), before_step=8) == (index.get(b"k"), 2)


def test_a_scan_of_children_is_bounded() -> None:
    pool = PagePool(100, on_evict=lambda page: None)
    index = PrefixIndex(1)
    for i in range(2 * MAX_SCANNED_CHILDREN):
        pages = pool.allocate(1)
        assert pages is not None
        index.insert(
            key=bytes([i]), parent=ROOT, content=content_of((i, 1)), pages=pages, step_id=0, pool=pool
        )
    last = 2 * MAX_SCANNED_CHILDREN - 1
    # The newest are looked at: what was asked a moment ago is found however much was asked before it.
    assert index.longest_partial(ROOT, content_of((last, 1)), before_step=1)[1] == 2
    assert index.longest_partial(ROOT, content_of((0, 1)), before_step=1) == (None, 0)


def test_content_that_is_there_leads_to_its_keys_without_a_hash() -> None:
    rng = random.Random(5)
    pool = PagePool(40, on_evict=lambda page: None)
    index = PrefixIndex(1)
    size = BLOCK * TOKEN_BYTES
    content = content_of([rng.randrange(1000) for _ in range(8 * BLOCK)])
    keys = chain_keys(ROOT, content, size)
    pages: list[list[int]] = []
    for block, key in enumerate(keys):
        parent = keys[block - 1] if block else ROOT
        pages.append(pool.allocate(1) or [])
        part = content[block * size : (block + 1) * size]
        index.insert(key=key, parent=parent, content=part, pages=pages[-1], step_id=0, pool=pool)
    assert index.follow(ROOT, content, size) == keys
    assert index.follow(keys[2], content[3 * size :], size) == keys[3:]
    assert index.complete_chain(keys) == [index.get(key) for key in keys]
    # The same tokens after something else are another block's.
    assert index.follow(b"salted", content, size) == [] == index.follow(keys[0], content, size)
    changed = content[: 5 * size] + content_of([1000]) + content[5 * size + TOKEN_BYTES :]
    assert index.follow(ROOT, changed, size) == keys[:5]
    index.withdraw(pages[4], pool)
    assert index.follow(ROOT, content, size) == keys[:4]
    assert len(index.complete_chain(keys)) == 4
