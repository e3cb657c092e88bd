"""What may Python's collector look at while a process serves? Nothing of what was there when it began.

A full collection walks every object: with a model's libraries loaded that is 0.1 s, in which no step runs and
no stream advances. Modules, models and routes live as long as the process, so looking at them finds nothing.
"""

from __future__ import annotations

import gc
import threading


def freeze_collector() -> None:
    """Collect once, and leave what survives out of every later collection.

    For a process of our own, once it is ready: what is frozen and becomes garbage later is never freed.
    """
    gc.collect()
    gc.freeze()


class FrozenCollector:
    """Keeps what there is frozen from `hold` to the last holder's `release`: for engines in a user's process.

    What becomes part of a cycle of garbage meanwhile is freed after that, anything else at once.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_holders = 0

    def hold(self) -> None:
        with self._lock:
            self._num_holders += 1
            freeze_collector()

    def release(self) -> None:
        with self._lock:
            self._num_holders -= 1
            if not self._num_holders:
                gc.unfreeze()


FROZEN = FrozenCollector()
