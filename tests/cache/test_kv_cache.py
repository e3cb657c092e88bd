"""Does the face that the scheduler sees match, take, grow and give back exactly what it says?"""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from slipstream.cache import kv_cache
from slipstream.cache.block_table import BlockTable
from slipstream.cache.groups import resolve
from slipstream.cache.keys import block_key, chain_keys, content_of, root_key
from slipstream.cache.kv_cache import KvCache
from slipstream.core.cache_group import CacheGroup
from slipstream.core.kv_retention import KvCacheRetentionConfig, TokenRangeRetentionConfig

SIZE = 8
WINDOW = 16
TOKENS = list(range(100, 150))  # six blocks and a tail of two


def cache_of(num_pages: int = 100, *, is_hybrid: bool = False, **options: bool) -> KvCache:
    declared = [CacheGroup(layers=(0,), kind="full", heads=1, head_dim=4)]
    if is_hybrid:
        declared.insert(0, CacheGroup(layers=(1,), kind="window", window=WINDOW, heads=1, head_dim=4))
    return KvCache(resolve(declared, block_tokens=SIZE, element_bytes=2), num_pages, **options)


def run_prompt(cache: KvCache, tokens: Sequence[int], *, step_id: int) -> BlockTable:
    """Admit a prompt, compute it in one step, publish it."""
    table = cache.new_table()
    hit = cache.lookup(table, tokens, step_id=step_id)
    assert cache.admit(table, hit, len(tokens), step_id=step_id) is not None
    cache.publish(table, tokens, len(tokens), step_id=step_id)
    cache.publish_tail(table, tokens, step_id=step_id)
    return table


def cached(cache: KvCache, tokens: Sequence[int], *, step_id: int) -> tuple[int, int]:
    hit = cache.lookup(cache.new_table(), tokens, step_id=step_id)
    return len(hit.nodes), hit.partial_len


@pytest.mark.parametrize(
    ("num_tokens", "in_later_step", "in_same_step"),
    [
        (50, (6, 1), (6, 0)),  # the last token is always recomputed
        (49, (6, 0), (6, 0)),
        (48, (5, 7), (5, 0)),
        (47, (5, 6), (5, 0)),
        (8, (0, 7), (0, 0)),
        (1, (0, 0), (0, 0)),
    ],
)
def test_lookup_matches_whole_blocks_at_once_and_parts_a_step_later(
    num_tokens: int, in_later_step: tuple[int, int], in_same_step: tuple[int, int]
) -> None:
    cache = cache_of()
    run_prompt(cache, TOKENS, step_id=3)
    assert cached(cache, TOKENS[:num_tokens], step_id=4) == in_later_step
    assert cached(cache, TOKENS[:num_tokens], step_id=3) == in_same_step


def test_options_turn_reuse_off() -> None:
    for options, expected in [
        ({"enable_partial_reuse": False}, (6, 0)),
        ({"enable_block_reuse": False}, (0, 0)),
    ]:
        cache = cache_of(**options)
        run_prompt(cache, TOKENS, step_id=0)
        assert cached(cache, TOKENS, step_id=1) == expected


def test_wanted_names_what_the_sequence_will_write() -> None:
    cache = cache_of()
    run_prompt(cache, TOKENS[:16], step_id=0)
    table = cache.new_table()
    hit = cache.lookup(table, TOKENS, step_id=1)
    assert len(hit.nodes) == 2
    assert hit.wanted == (*table.keys[2:6], block_key(table.keys[5], content_of(TOKENS[48:])))
    assert cache.no_hit(table, TOKENS).wanted == (*table.keys[:2], *hit.wanted)


def test_a_refused_admission_changes_nothing() -> None:
    cache = cache_of(9)
    cache.release(run_prompt(cache, TOKENS[:20], step_id=0), after_step=0)
    cache.pool.retire(0)
    table = cache.new_table()
    hit = cache.lookup(table, TOKENS + TOKENS, step_id=1)
    assert len(hit.nodes) == 2 and hit.partial_len == 4
    before = [cache.pool.references(page) for page in range(9)]
    assert cache.admit(table, hit, 100, step_id=1) is None
    assert [cache.pool.references(page) for page in range(9)] == before == [0] * 9
    assert cache.pool.num_free == 8 and table.capacity == 0 and table.pages == [[]]
    cache.pool.check()
    assert cached(cache, TOKENS, step_id=1) == (2, 4)


def test_an_admission_shares_copies_and_grows() -> None:
    cache = cache_of()
    first = run_prompt(cache, TOKENS[:20], step_id=0)
    table = cache.new_table()
    hit = cache.lookup(table, TOKENS, step_id=1)
    copies = cache.admit(table, hit, 30, step_id=1)
    assert table.pages[0][:2] == first.pages[0][:2] and len(table.pages[0]) == 4
    assert copies == [(first.pages[0][2], table.pages[0][2])]
    assert set(table.pages[0][2:]).isdisjoint(first.pages[0])
    # The source stays until the copying step has retired, even if its owner leaves at once.
    cache.release(first, after_step=0)
    cache.pool.retire(0)
    assert cache.pool.references(copies[0][0]) == 1
    cache.pool.retire(1)
    assert cache.pool.references(copies[0][0]) == 0
    cache.pool.check()


def test_the_end_of_a_sequence_is_evicted_before_its_start() -> None:
    cache = cache_of(8)
    for tokens, step_id in [(TOKENS[:24], 0), (list(range(24)), 1)]:
        cache.release(run_prompt(cache, tokens, step_id=step_id), after_step=step_id)
        cache.pool.retire(step_id)
    found = []
    for num_taken in range(1, 8):
        pages = cache.pool.allocate(num_taken)
        assert pages is not None
        found.append([cached(cache, [*tokens, 1], step_id=9)[0] for tokens in (TOKENS[:24], list(range(24)))])
        cache.pool.release(pages, after_step=-1)
    # One page was blank; then the older prompt goes, last block first, then the younger one.
    assert found == [[3, 3], [2, 3], [1, 3], [0, 3], [0, 2], [0, 1], [0, 0]]


def test_a_tail_is_replaced_by_the_block_it_grows_into() -> None:
    cache = cache_of()
    table = run_prompt(cache, TOKENS[:20], step_id=0)
    assert len(cache._index) == 3
    cache.publish(table, TOKENS[:26], 25, step_id=5)
    assert len(cache._index) == 3 and table.tail_key is None
    assert cached(cache, TOKENS[:26], step_id=6) == (3, 0)


@pytest.mark.parametrize(
    ("num_tokens", "max_span", "window_pages"),
    [
        (8, 64, 1),
        (50, 64, 7),  # shorter than what one step and its window cover
        (500, 1, 3),  # 16 tokens lie in at most three blocks
        (500, 64, 11),  # 15 tokens before a chunk of 64
    ],
)
def test_pages_for_bounds_what_a_window_holds(num_tokens: int, max_span: int, window_pages: int) -> None:
    cache = cache_of(is_hybrid=True)
    assert cache.pages_for(num_tokens, max_span=max_span) == window_pages + -(-num_tokens // SIZE)
    table = cache.new_table()
    most = 0
    for start in range(0, num_tokens, max_span):
        cache.trim(table, start, after_step=-1)
        assert cache.extend(table, min(num_tokens, start + max_span)) is not None
        most = max(most, sum(page != 0 for page in table.pages[0]))
        if start > 400:
            break
    assert most <= window_pages


def test_trim_gives_back_exactly_what_no_query_sees() -> None:
    cache = cache_of(is_hybrid=True)
    table = run_prompt(cache, TOKENS, step_id=0)
    # The query at 31 sees 16 to 31; block 1 (8 to 15) is behind it, and was not behind the query at 30.
    cache.trim(table, 30, after_step=0)
    assert table.first_live == [1, 0]
    cache.trim(table, 31, after_step=0)
    assert table.first_live == [2, 0] and table.pages[0][:2] == [0, 0] and 0 not in table.pages[1]
    assert cache.pool.num_retiring == 2
    cache.pool.retire(0)
    cache.pool.check()
    assert cached(cache, TOKENS, step_id=1) == (6, 1)  # given back, but still findable


def test_a_hit_is_the_meet_over_groups() -> None:
    """A window group needs the two blocks before the end of the hit, a full group all of them."""

    def withdrawn(group: int, block: int) -> KvCache:
        cache = cache_of(is_hybrid=True)
        table = run_prompt(cache, TOKENS, step_id=0)
        cache._index.withdraw([table.pages[group][block]], cache.pool)
        return cache

    lengths = [24, 32, 40, 49]
    window = withdrawn(0, 2)
    assert [cached(window, [*TOKENS[:n], 1], step_id=1)[0] for n in lengths] == [2, 2, 5, 6]
    whole = withdrawn(1, 2)
    assert [cached(whole, [*TOKENS[:n], 1], step_id=1)[0] for n in lengths] == [2, 2, 2, 2]
    table = window.new_table()
    hit = window.lookup(table, TOKENS, step_id=1)
    window.admit(table, hit, 50, step_id=1)
    assert table.pages[0][:4] == [0] * 4 and table.first_live == [4, 0]


def test_condemned_pages_are_found_no_more_and_zeroed_once() -> None:
    cache = cache_of(8)
    table = run_prompt(cache, TOKENS[:20], step_id=0)
    pages = list(table.pages[0])
    assert cache.condemn(table) == set(pages)
    cache.release(table, after_step=-1)
    assert cached(cache, TOKENS[:20], step_id=1) == (0, 0)
    for expected in (3, 0):
        table = cache.new_table()
        copies = cache.admit(table, cache.no_hit(table, [1] * 56), 56, step_id=1)
        assert copies is not None and [source for source, _ in copies] == [0] * expected
        assert {target for _, target in copies} == set(pages[:expected])
        cache.release(table, after_step=-1)


def test_condemning_spares_what_came_before_the_first_bad_page() -> None:
    cache = cache_of()
    first = run_prompt(cache, TOKENS[:16], step_id=0)
    second = run_prompt(cache, TOKENS, step_id=1)
    assert cache.condemn(second, {second.pages[0][3]}) == set(second.pages[0][3:])
    assert cached(cache, TOKENS, step_id=2) == (3, 0)
    assert cache.condemn(second) == set(second.pages[0][2:])  # all that it wrote, not what it shares
    assert first.has_read(set(first.pages[0])) and not first.has_read(set(second.pages[0][2:]))


def test_a_table_remembers_pages_only_while_steps_may_use_them() -> None:
    """Three steps are outstanding, and each plan trims one block."""
    cache = cache_of(300, is_hybrid=True)
    table = cache.new_table()
    for step_id in range(100):
        cache.trim(table, step_id * SIZE, after_step=step_id - 1)
        assert cache.extend(table, (step_id + 1) * SIZE) is not None
        cache.pool.retire(step_id - 3)
    left = {page for _, pages in table.left for page in pages}
    assert len(left) == 3 and table.has_read(left)


def test_reset_forgets_all_prefixes() -> None:
    cache = cache_of()
    table = run_prompt(cache, TOKENS, step_id=0)
    cache.reset_prefix_cache()
    assert cached(cache, TOKENS, step_id=1) == (0, 0)
    cache.release(table, after_step=0)
    cache.pool.retire(0)
    cache.pool.check()
    assert cache.pool.num_free == cache.pool.num_usable and len(cache._index) == 0


def retained(cache: KvCache, tokens: Sequence[int], config: KvCacheRetentionConfig, *, step_id: int) -> None:
    """Compute a prompt of 16 tokens and the rest as if it were generated; give everything back."""
    table = cache.new_table(retention=config, num_prompt=16)
    hit = cache.lookup(table, tokens, step_id=step_id)
    first = max(16, len(hit.nodes) * SIZE + hit.partial_len)
    assert cache.admit(table, hit, first, step_id=step_id) is not None
    assert cache.extend(table, len(tokens)) is not None
    cache.publish(table, tokens, len(tokens), step_id=step_id)
    cache.release(table, after_step=-1)


def kept_of(cache: KvCache, prompts: Sequence[Sequence[int]], num_taken: int) -> list[int]:
    """Return how many blocks of each prompt are found after that many pages were taken for something else."""
    pages = cache.pool.allocate(num_taken)
    assert pages is not None
    found = [cached(cache, [*tokens, 1], step_id=99)[0] for tokens in prompts]
    cache.pool.release(pages, after_step=-1)
    return found


def test_what_is_worth_keeping_is_kept() -> None:
    """Four prompts of 24 tokens in twelve pages; the oldest has a start that is worth more than the rest."""
    prompts = [[100 + i] * 24 for i in range(4)]
    first_block = TokenRangeRetentionConfig(token_start=0, token_end=8, priority=90)
    config = KvCacheRetentionConfig(token_range_retention_configs=[first_block], decode_retention_priority=5)
    cache = cache_of(13)
    for i, tokens in enumerate(prompts):
        retained(cache, tokens, config if i == 0 else KvCacheRetentionConfig(), step_id=i)
    # First what the first generated, then its second block, then the others in turn, last its start.
    assert kept_of(cache, prompts, 1) == [2, 3, 3, 3]
    assert kept_of(cache, prompts, 2) == [1, 3, 3, 3]
    assert kept_of(cache, prompts, 11) == [1, 0, 0, 0]
    assert kept_of(cache, prompts, 12) == [0, 0, 0, 0]


def test_a_request_without_a_word_leaves_the_priority_that_it_finds() -> None:
    prompts = [[100 + i] * 24 for i in range(2)]
    whole = TokenRangeRetentionConfig(token_start=0, priority=90)
    config = KvCacheRetentionConfig(token_range_retention_configs=[whole], decode_retention_priority=90)
    cache = cache_of(7)
    retained(cache, prompts[0], config, step_id=0)
    run_again = cache.new_table()
    hit = cache.lookup(run_again, [*prompts[0], 1], step_id=1)
    assert len(hit.nodes) == 3 and cache.admit(run_again, hit, 25, step_id=1) is not None
    cache.release(run_again, after_step=-1)
    retained(cache, prompts[1], KvCacheRetentionConfig(), step_id=2)
    assert kept_of(cache, prompts, 3) == [3, 0]
    # One that says less lowers it. It copies the last block, which it would have to recompute in part.
    less = KvCacheRetentionConfig(
        token_range_retention_configs=[TokenRangeRetentionConfig(token_start=0, priority=1)],
        decode_retention_priority=1,
    )
    cache = cache_of(8)
    for step_id, (i, said) in enumerate([(0, config), (1, config), (0, less)]):
        retained(cache, prompts[i], said, step_id=step_id)
    assert kept_of(cache, prompts, 3) == [0, 3]


def test_a_priority_expires() -> None:
    now = 0.0
    groups = resolve(
        [CacheGroup(layers=(0,), kind="full", heads=1, head_dim=4)], block_tokens=SIZE, element_bytes=2
    )
    cache = KvCache(groups, 7, clock=lambda: now)
    prompts = [[100 + i] * 24 for i in range(2)]
    first = TokenRangeRetentionConfig(token_start=0, priority=90, duration_ms=5000)
    config = KvCacheRetentionConfig(
        token_range_retention_configs=[first], decode_retention_priority=90, decode_duration_ms=5000
    )
    retained(cache, prompts[0], config, step_id=0)
    retained(cache, prompts[1], KvCacheRetentionConfig(), step_id=1)
    now = 4.9
    assert kept_of(cache, prompts, 2) == [3, 1]
    now = 5.0
    assert kept_of(cache, prompts, 3) == [2, 1]


def test_salts_are_roots_of_their_own() -> None:
    cache = cache_of()
    assert cache.new_table().root == root_key()
    assert cache.new_table(salt="a").root == root_key(salt="a")


def test_a_lookup_hashes_only_what_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = cache_of()
    run_prompt(cache, TOKENS[:40], step_id=0)
    longer = [*TOKENS, *range(900, 914)]
    expected = cache_of().new_table()
    cache_of().lookup(expected, longer, step_id=1)
    hashed: list[int] = []

    def chain(parent: bytes, content: bytes, block_bytes: int) -> list[bytes]:
        hashed.append(len(content) // block_bytes)
        return chain_keys(parent, content, block_bytes)

    monkeypatch.setattr(kv_cache, "chain_keys", chain)
    table = cache.new_table()
    assert len(cache.lookup(table, TOKENS, step_id=1).nodes) == 5
    assert hashed == [1] and table.keys == expected.keys[:6]
    # What is known of a table is not looked for again, and a longer text goes on from there.
    cache.lookup(table, TOKENS, step_id=2)
    cache.lookup(table, longer, step_id=3)
    assert hashed == [1, 2] and table.keys == expected.keys
