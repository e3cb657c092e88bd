"""Which free page with reusable content is given up first? The lowest priority, then the least recently used.

Invariant: the order is exact, expiry included: a priority whose time has run out counts as the default, at
the place in the order of use that the page has had all along. Time is looked at only when a page is wanted;
every operation is O(1), or O(log pages) where a priority expires. Priorities as in TensorRT-LLM's
`KvCacheRetentionConfig`.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Callable, Iterator

from slipstream.core.kv_retention import DEFAULT_PRIORITY, MAX_PRIORITY

# Stale entries that a heap keeps before it is rebuilt, beside one per page.
SLACK = 64
# The bucket of expired pages.
EXPIRED = MAX_PRIORITY + 1


class EvictionOrder:
    """Pages in the order of eviction. `clock` is in seconds and never runs backwards."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._stamp = 0
        # One bucket per priority, page -> stamp of its last use; the last one holds expired pages, unordered.
        self._buckets: list[OrderedDict[int, int]] = [OrderedDict() for _ in range(EXPIRED + 1)]
        self._bucket_of: dict[int, int] = {}
        self._occupied = 0  # bit p: bucket p holds a page
        self._expiring: list[tuple[float, int, int]] = []  # (when, stamp, page)
        self._expired: list[tuple[int, int]] = []  # (stamp, page)

    def __len__(self) -> int:
        return len(self._bucket_of)

    def __iter__(self) -> Iterator[int]:
        return iter(self._bucket_of)

    def __contains__(self, page: object) -> bool:
        return page in self._bucket_of

    def add(self, page: int, priority: int = DEFAULT_PRIORITY, duration_s: float | None = None) -> None:
        """Add a page that was used just now; its priority is the default after `duration_s`."""
        self._stamp += 1
        self._put(page, priority, self._stamp)
        if duration_s is not None:
            heapq.heappush(self._expiring, (self._clock() + duration_s, self._stamp, page))
            if len(self._expiring) > len(self._bucket_of) + SLACK:
                self._expiring = [entry for entry in self._expiring if self._is_current(*entry[1:])]
                heapq.heapify(self._expiring)

    def remove(self, page: int) -> None:
        bucket = self._bucket_of.pop(page)
        pages = self._buckets[bucket]
        del pages[page]
        if not pages:
            self._occupied &= ~(1 << bucket)

    def pop(self) -> int:
        """Remove and return the page to evict."""
        if self._expiring:
            self._expire()
        page = self._first()
        self.remove(page)
        return page

    def _first(self) -> int:
        lowest = (self._occupied & -self._occupied).bit_length() - 1
        if self._buckets[EXPIRED] and lowest >= DEFAULT_PRIORITY:
            stamp, page = self._first_expired()
            # Expired pages have the default priority, so that they mix with its bucket by their last use.
            if lowest > DEFAULT_PRIORITY or stamp < next(iter(self._buckets[lowest].values())):
                return page
        return next(iter(self._buckets[lowest]))

    def _first_expired(self) -> tuple[int, int]:
        while not self._is_current(*self._expired[0]):
            heapq.heappop(self._expired)
        return self._expired[0]

    def _expire(self) -> None:
        """Move every page whose time has run out."""
        now = self._clock()
        while self._expiring and self._expiring[0][0] <= now:
            _, stamp, page = heapq.heappop(self._expiring)
            if self._is_current(stamp, page):
                self.remove(page)
                self._put(page, EXPIRED, stamp)
                heapq.heappush(self._expired, (stamp, page))
        if len(self._expired) > len(self._bucket_of) + SLACK:
            self._expired = [entry for entry in self._expired if self._is_current(*entry)]
            heapq.heapify(self._expired)

    def _is_current(self, stamp: int, page: int) -> bool:
        """Say whether a heap's entry still speaks of the page's last use."""
        bucket = self._bucket_of.get(page)
        return bucket is not None and self._buckets[bucket][page] == stamp

    def _put(self, page: int, bucket: int, stamp: int) -> None:
        self._bucket_of[page] = bucket
        self._buckets[bucket][page] = stamp
        self._occupied |= 1 << bucket
