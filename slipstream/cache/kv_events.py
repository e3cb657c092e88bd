"""What has become findable in the cache, and what no more? A bounded buffer of events for routers.

Invariant: whoever applies every event, in order, holds exactly the prefix index: which block is cached in
which group. A full buffer drops its oldest event; `event_id` counts on, so a gap tells a reader that it has
missed some and must forget what it holds.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

# Neighbouring blocks share an event up to this many, so that a buffer of events is bounded in bytes too.
MAX_BLOCKS_PER_EVENT = 64

Event = dict[str, Any]


class KvEvents:
    """Events as dictionaries of plain values; hashes are hexadecimal block keys.

    `{"event_id", "type": "stored", "group", "parent_hash", "block_hashes", "token_ids", "block_size"}`: the
    blocks follow each other after the parent (of a first block the root key, which depends on the salt); each
    has `block_size` tokens, or it is alone and the unfinished end of a prompt.
    `{"event_id", "type": "removed", "group", "block_hashes"}`; `{"event_id", "type": "cleared"}`: all of it.
    """

    def __init__(self, *, max_size: int, block_tokens: int) -> None:
        self._block_tokens = block_tokens
        self._events: deque[Event] = deque(maxlen=max_size)
        self._next_id = 0
        # The event of each group that the next block may join; all are of one type.
        self._open: dict[int, Event] = {}
        self._open_type = ""

    def __len__(self) -> int:
        return len(self._events)

    def stored(self, group: int, *, key: bytes, parent: bytes, tokens: Sequence[int]) -> None:
        """Note that a block can be found in a group."""
        event = self._joinable("stored", group)
        is_next = (
            event is not None
            and event["block_hashes"][-1] == parent.hex()
            and len(event["token_ids"]) == len(event["block_hashes"]) * self._block_tokens
            and len(tokens) == self._block_tokens
        )
        if event is None or not is_next:
            event = self._start(
                "stored",
                group,
                parent_hash=parent.hex(),
                block_hashes=[],
                token_ids=[],
                block_size=self._block_tokens,
            )
        event["block_hashes"].append(key.hex())
        event["token_ids"] += tokens

    def removed(self, group: int, *, key: bytes) -> None:
        """Note that a block can no longer be found in a group."""
        event = self._joinable("removed", group) or self._start("removed", group, block_hashes=[])
        event["block_hashes"].append(key.hex())

    def cleared(self) -> None:
        """Note that nothing can be found any more."""
        self._close("cleared")
        self._append({"type": "cleared"})

    def drain(self) -> list[Event]:
        """Return the events since the last call."""
        events = list(self._events)
        self._events.clear()
        self._close("")
        return events

    def _joinable(self, kind: str, group: int) -> Event | None:
        """Return the event that a block of this kind may join: what happens between is of the same kind."""
        if kind != self._open_type:
            self._close(kind)
        event = self._open.get(group)
        return event if event is not None and len(event["block_hashes"]) < MAX_BLOCKS_PER_EVENT else None

    def _close(self, kind: str) -> None:
        self._open.clear()
        self._open_type = kind

    def _start(self, kind: str, group: int, **fields: Any) -> Event:
        event = self._open[group] = self._append({"type": kind, "group": group, **fields})
        return event

    def _append(self, fields: Event) -> Event:
        event = {"event_id": self._next_id, **fields}
        self._next_id += 1
        self._events.append(event)
        return event
