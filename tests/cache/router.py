"""What does a reader of KV events believe that the cache holds? And what does it hold?"""

from __future__ import annotations

from typing import Any

from slipstream.cache.keys import tokens_of
from slipstream.cache.kv_cache import KvCache


class Router:
    """What a reader of the events believes: (block hash, group) -> (parent, tokens)."""

    def __init__(self) -> None:
        self.blocks: dict[tuple[str, int], tuple[str, tuple[int, ...]]] = {}
        self.next_id = 0

    def apply(self, events: list[dict[str, Any]]) -> None:
        for event in events:
            assert event["event_id"] == self.next_id
            self.next_id += 1
            match event["type"]:
                case "stored":
                    self._store(event)
                case "removed":
                    for key in event["block_hashes"]:
                        del self.blocks[key, event["group"]]
                case "cleared":
                    self.blocks.clear()

    def _store(self, event: dict[str, Any]) -> None:
        parent, size = event["parent_hash"], event["block_size"]
        for i, key in enumerate(event["block_hashes"]):
            tokens = tuple(event["token_ids"][i * size : (i + 1) * size])
            assert tokens and (key, event["group"]) not in self.blocks
            self.blocks[key, event["group"]] = (parent, tokens)
            parent = key


def index_of(cache: KvCache) -> dict[tuple[str, int], tuple[str, tuple[int, ...]]]:
    return {
        (key.hex(), group): (node.parent.hex(), tuple(tokens_of(node.content)))
        for key, node in cache._index._nodes.items()
        for group, page in enumerate(node.pages)
        if page
    }
