"""The loop, as prose: plan, execute, commit, emit.

Up to `depth` plans are outstanding: with 1 a step is collected before the next is planned, with 2 the next
plan is launched before the last is committed. It is one loop for both.
"""

from __future__ import annotations

import time
from collections import deque
from typing import Any

from slipstream.core.outputs import TokenEvent
from slipstream.core.request import Request
from slipstream.engine.runner import StepRunner
from slipstream.engine.scheduler import Scheduler


class Engine:
    """A scheduler and a runner, driven by one thread."""

    def __init__(self, scheduler: Scheduler, runner: StepRunner, *, depth: int) -> None:
        self.scheduler = scheduler
        self.runner = runner
        self.depth = depth
        self._in_flight: deque[Any] = deque()

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def submit(self, request: Request) -> None:
        self.scheduler.submit(request)

    def abort(self, request_id: str, index: int | None = None) -> list[TokenEvent]:
        return self.scheduler.abort(request_id, index)

    def step(self) -> list[TokenEvent]:
        """End what ran out of time, launch what can be launched, commit the oldest outstanding step."""
        expired = self.scheduler.expire(time.monotonic())
        while len(self._in_flight) < self.depth:
            plan = self.scheduler.plan()
            if plan is None:
                break
            handle = self.runner.launch(plan)
            self.runner.sample(handle)
            self._in_flight.append(handle)
        if not self._in_flight:
            return expired
        result = self.runner.collect(self._in_flight.popleft())
        return expired + self.scheduler.commit(result)
