"""Which content is about to exist, and who waits for it instead of computing it twice?

A sequence that starts its prompt in chunks promises the keys of the blocks it will write. A request whose
prompt begins with promised blocks parks on the last of them and comes back when it is written, or when the
owner leaves. Waiters are opaque; every operation is O(1) per key, whatever the number of parked requests.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Generic, TypeVar

W = TypeVar("W")


class Promises(Generic[W]):
    """Promised keys (counted: two owners may promise the same one) and the waiters parked on them."""

    def __init__(self) -> None:
        self._owners: dict[bytes, int] = {}
        self._parked: dict[bytes, list[W]] = {}
        self._num_parked = 0

    @property
    def num_parked(self) -> int:
        return self._num_parked

    def __contains__(self, key: object) -> bool:
        return key in self._owners

    def add(self, keys: Iterable[bytes]) -> None:
        for key in keys:
            self._owners[key] = self._owners.get(key, 0) + 1

    def park(self, key: bytes, waiter: W) -> None:
        assert key in self._owners, "nobody promised this key"
        self._parked.setdefault(key, []).append(waiter)
        self._num_parked += 1

    def end(self, keys: Iterable[bytes]) -> list[W]:
        """Take back one promise of each key (kept or broken) and return the waiters parked on them."""
        freed: list[W] = []
        for key in keys:
            count = self._owners[key] - 1
            if count:
                self._owners[key] = count
            else:
                del self._owners[key]
            freed += self._parked.pop(key, ())
        self._num_parked -= len(freed)
        return freed

    def parked(self) -> list[W]:
        """Every parked waiter. O(parked)."""
        return [waiter for waiters in self._parked.values() for waiter in waiters]
