"""Does whoever applies the events hold the prefix index, and nothing else?"""

from __future__ import annotations

import pytest

from slipstream.cache.groups import resolve
from slipstream.cache.keys import TOKEN_BYTES, chain_keys, content_of, root_key
from slipstream.cache.kv_cache import KvCache
from slipstream.cache.kv_events import MAX_BLOCKS_PER_EVENT, KvEvents
from slipstream.core.cache_group import CacheGroup
from slipstream.core.errors import ConfigError

SIZE = 8
TOKENS = list(range(100, 150))  # six blocks and a tail of two


def cache_of(num_pages: int = 100, *, max_size: int = 100, layers: int = 1) -> KvCache:
    groups = [CacheGroup(layers=(layer,), kind="full", heads=1, head_dim=4) for layer in range(layers)]
    resolved = resolve(groups, block_tokens=SIZE, element_bytes=2)
    return KvCache(resolved, num_pages, event_buffer_max_size=max_size)


def run_prompt(cache: KvCache, tokens: list[int], *, step_id: int = 0) -> None:
    table = cache.new_table()
    assert (
        cache.admit(table, cache.lookup(table, tokens, step_id=step_id), len(tokens), step_id=step_id)
        is not None
    )
    cache.publish(table, tokens, len(tokens), step_id=step_id)
    cache.publish_tail(table, tokens, step_id=step_id)
    cache.release(table, after_step=-1)


def keys_of(tokens: list[int]) -> list[str]:
    whole = content_of(tokens[: len(tokens) // SIZE * SIZE])
    return [key.hex() for key in chain_keys(root_key(), whole, SIZE * TOKEN_BYTES)]


@pytest.mark.parametrize("layers", [1, 2])
def test_blocks_of_a_prompt_share_an_event_per_group(layers: int) -> None:
    cache = cache_of(layers=layers)
    run_prompt(cache, TOKENS)
    events = cache.drain_kv_events()
    assert cache.drain_kv_events() == []
    whole = [event for event in events if len(event["block_hashes"]) == 6]
    tails = [event for event in events if len(event["block_hashes"]) == 1]
    assert [event["group"] for event in whole] == [event["group"] for event in tails] == list(range(layers))
    assert len(events) == 2 * layers
    common = {"type": "stored", "block_size": SIZE}
    for event, tail in zip(whole, tails, strict=True):
        assert event == common | {
            "event_id": event["event_id"],
            "group": event["group"],
            "parent_hash": root_key().hex(),
            "block_hashes": keys_of(TOKENS),
            "token_ids": TOKENS[:48],
        }
        assert tail["parent_hash"] == keys_of(TOKENS)[-1] and tail["token_ids"] == TOKENS[48:]


def test_eviction_and_reset_are_told() -> None:
    cache = cache_of(8)
    run_prompt(cache, TOKENS)
    cache.drain_kv_events()
    run_prompt(cache, list(range(16)), step_id=1)
    removed, stored = cache.drain_kv_events()
    # The end of the older prompt is evicted first: its tail and its last block.
    assert removed["type"] == "removed" and removed["block_hashes"][1] == keys_of(TOKENS)[-1]
    assert stored["type"] == "stored" and stored["block_hashes"] == keys_of(list(range(16)))
    cache.reset_prefix_cache()
    run_prompt(cache, list(range(16)), step_id=2)
    assert [event["type"] for event in cache.drain_kv_events()] == ["cleared", "stored"]


def test_what_is_stored_again_after_a_removal_is_an_event_of_its_own() -> None:
    """Joined to an older event it would be applied before the removal."""
    events = KvEvents(max_size=10, block_tokens=1)
    events.stored(0, key=b"a", parent=b"", tokens=[1])
    events.stored(1, key=b"a", parent=b"", tokens=[1])
    events.stored(0, key=b"b", parent=b"a", tokens=[2])
    events.removed(0, key=b"b")
    events.stored(0, key=b"b", parent=b"a", tokens=[2])
    kinds = [(event["type"], event["group"], event["block_hashes"]) for event in events.drain()]
    assert kinds == [
        ("stored", 0, ["61", "62"]),
        ("stored", 1, ["61"]),
        ("removed", 0, ["62"]),
        ("stored", 0, ["62"]),
    ]


def test_a_drained_event_grows_no_more() -> None:
    events = KvEvents(max_size=10, block_tokens=1)
    events.stored(0, key=b"a", parent=b"", tokens=[1])
    first = events.drain()
    events.stored(0, key=b"b", parent=b"a", tokens=[2])
    assert [len(event["block_hashes"]) for event in [*first, *events.drain()]] == [1, 1]


def test_a_full_buffer_drops_the_oldest_and_shows_the_gap() -> None:
    events = KvEvents(max_size=4, block_tokens=1)
    for i in range(10 * MAX_BLOCKS_PER_EVENT):
        events.stored(
            0, key=bytes([i // 256, i % 256]), parent=bytes([(i - 1) // 256 % 256, (i - 1) % 256]), tokens=[i]
        )
    found = events.drain()
    assert [event["event_id"] for event in found] == [6, 7, 8, 9]
    assert all(len(event["block_hashes"]) == MAX_BLOCKS_PER_EVENT for event in found)
    events.cleared()
    assert events.drain() == [{"event_id": 10, "type": "cleared"}]


def test_events_are_refused_where_they_are_off() -> None:
    with pytest.raises(ConfigError, match=r"event_buffer_max_size=N"):
        cache_of(max_size=0).drain_kv_events()
