"""How does a test run the tensor ranks of a model in one process? One thread a rank, meeting at collectives.

Invariant: a collective takes every rank's part, in rank order, as a process group would; a rank that fails or
never comes breaks the meeting for all, within seconds.
"""

from __future__ import annotations

import dataclasses
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from slipstream.parallel.mesh import Mesh

TIMEOUT_S = 30.0


class Meeting:
    """Where the ranks exchange tensors; `counts` says how often each collective met."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.counts: Counter[str] = Counter()
        self.barrier = threading.Barrier(size, timeout=TIMEOUT_S)
        self._parts: list[Tensor | None] = [None] * size

    def exchange(self, rank: int, x: Tensor, collective: str) -> list[Tensor]:
        """Leave `x`, wait for all, and return a copy of everyone's."""
        self._parts[rank] = x
        self.counts[collective] += rank == 0
        self.barrier.wait()
        parts = [part.clone() for part in self._parts if part is not None]
        # Nobody may write to its part before all have copied it.
        self.barrier.wait()
        return parts

    def run(self, work: Callable[[int], Any]) -> list[Any]:
        """Run `work(rank)` of every rank, each in a thread, and return the results in rank order."""

        def guarded(rank: int) -> Any:
            try:
                return work(rank)
            except BaseException:
                self.barrier.abort()
                raise

        with ThreadPoolExecutor(self.size) as pool:
            futures = [pool.submit(guarded, rank) for rank in range(self.size)]
            errors = [error for future in futures if (error := future.exception()) is not None]
            # A broken barrier is what the others see of the first failure.
            errors.sort(key=lambda error: isinstance(error, threading.BrokenBarrierError))
            if errors:
                raise errors[0]
            return [future.result() for future in futures]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LockstepMesh(Mesh):
    """A rank whose collectives run through a `Meeting`."""

    meeting: Meeting

    def all_reduce(self, x: Tensor) -> Tensor:
        parts = self.meeting.exchange(self.tp_rank, x, "all_reduce")
        return x.copy_(torch.stack(parts).sum(0))

    def all_gather(self, x: Tensor, dim: int) -> Tensor:
        return torch.cat(self.meeting.exchange(self.tp_rank, x, "all_gather"), dim)
