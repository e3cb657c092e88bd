"""How long does each part of a start take? Named phases in seconds, in the order in which they ran.

Importing this module starts the clock of the phase "import": `assembly` imports it before anything heavy.
Invariant: phases do not overlap, but those that ran beside others, which `beside` names.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Generator
from typing import TypeVar

T = TypeVar("T")

IMPORT_STARTED_S = time.perf_counter()


class PhaseClock:
    """The phases of one start. `import_s` came before it and is told beside them."""

    def __init__(self, *, import_s: float = 0.0) -> None:
        self.import_s = import_s
        self._started_s = time.perf_counter()
        self.seconds: dict[str, float] = {}
        self.beside: set[str] = set()

    @contextlib.contextmanager
    def phase(self, name: str) -> Generator[None]:
        """Add the time spent inside to a phase."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started

    def timed(self, name: str, work: Callable[[], T]) -> Callable[[], T]:
        """Return `work` for another thread, timed as a phase beside the others."""
        self.beside.add(name)

        def run() -> T:
            with self.phase(name):
                return work()

        return run

    @property
    def total_s(self) -> float:
        return time.perf_counter() - self._started_s

    def line(self) -> str:
        """Return the budget as one line."""
        parts = [
            f"{name} {seconds:.2f}{' beside them' if name in self.beside else ''}"
            for name, seconds in self.seconds.items()
        ]
        before = f" after an import of {self.import_s:.2f} s"
        return f"ready in {self.total_s:.2f} s{before}: {', '.join(parts)}"


def seconds_since_import_began() -> float:
    return time.perf_counter() - IMPORT_STARTED_S
