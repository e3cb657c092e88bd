"""Who waits, in which order, and who waits for somebody else's work?

Invariant: a sequence that waits is either in the heap or parked on a key that a running sequence promised to
compute; both count as waiting, and order is (priority, arrival) for life. What ended while waiting is skipped
when it comes up, so nothing here costs more than the logarithm of the queue.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence as Keys

from slipstream.cache.promises import Promises
from slipstream.engine.sequence import Sequence, State


class WaitingQueue:
    """Waiting sequences, the first in order first; at most `max_parked` of them parked at a time."""

    def __init__(self, *, max_parked: int) -> None:
        self._heap: list[tuple[tuple[int, int], Sequence]] = []
        self._size = 0
        self._max_parked = max_parked
        self._promises: Promises[Sequence] = Promises()
        self._tail_keys: list[bytes] = []

    def __len__(self) -> int:
        return self._size

    @property
    def num_ready(self) -> int:
        """Sequences that wait for nobody's work."""
        return self._size - self._promises.num_parked

    @property
    def is_closed(self) -> bool:
        """Whether so many are parked that a plan should look at no more of the queue."""
        return self._promises.num_parked >= self._max_parked

    def push(self, sequence: Sequence) -> None:
        heapq.heappush(self._heap, (sequence.order, sequence))
        self._size += 1

    def head(self) -> Sequence | None:
        """Return the first in order that is not parked, without taking it."""
        while self._heap and self._heap[0][1].state is not State.WAITING:
            heapq.heappop(self._heap)
        return self._heap[0][1] if self._heap else None

    def take(self) -> None:
        """Take the head off: it runs now."""
        heapq.heappop(self._heap)
        self._size -= 1

    def forget(self) -> None:
        """Count one sequence less, which ended while it waited."""
        self._size -= 1

    def park_head(self, wanted: Keys[bytes]) -> bool:
        """Park the head on the last of the blocks it wants next that are promised; False if none is."""
        promised = None
        for key in wanted:
            if key not in self._promises:
                break
            promised = key
        if promised is None:
            return False
        self._promises.park(promised, heapq.heappop(self._heap)[1])
        return True

    def promise(self, sequence: Sequence, keys: Keys[bytes]) -> None:
        """Note that a sequence which starts to run is going to compute these blocks."""
        sequence.promised = list(keys)
        self._promises.add(keys)

    def keep(self, sequence: Sequence, num_keys: int, *, is_last: bool, copies_last: bool) -> None:
        """End the first `num_keys` promises of a sequence, now planned, and wake who waits for them.

        Waiters on a full block may match it in this very plan. The last block of a prompt (`is_last`), full
        or not, is copied where `copies_last`, and a copy runs ahead of the forward of its own step: its
        waiters come back in the next plan.
        """
        kept = sequence.promised[:num_keys]
        del sequence.promised[:num_keys]
        if is_last:
            if kept and not sequence.promised and copies_last:
                sequence.promised = [kept.pop()]
            self._tail_keys += sequence.promised
            sequence.promised = []
        self._wake(kept)

    def wake_tails(self) -> None:
        """Wake who waits for the last blocks that the plan before this one computes."""
        keys, self._tail_keys = self._tail_keys, []
        self._wake(keys)

    def break_promises(self, sequence: Sequence) -> None:
        """End what a leaving sequence still promised; its waiters compute it themselves."""
        keys, sequence.promised = sequence.promised, []
        self._wake(keys)

    def _wake(self, keys: Keys[bytes]) -> None:
        for waiter in self._promises.end(keys):
            if waiter.state is State.WAITING:
                heapq.heappush(self._heap, (waiter.order, waiter))
