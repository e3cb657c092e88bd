"""The loop, as prose: plan, execute, commit, emit.

Up to `depth` plans are outstanding: with 1 a step is collected before the next is planned, with 2 the next
plan is launched before the last is committed. It is one loop for both. While a row runs whose next step needs
tokens on the host, nothing is planned ahead of a step that is not collected.
"""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING, Any

from slipstream.core.errors import RequestError
from slipstream.core.outputs import TokenEvent
from slipstream.core.plan import StepPlan
from slipstream.core.request import Request
from slipstream.engine.scheduler import Scheduler
from slipstream.engine.step_records import EngineTrace, StepRecord

if TYPE_CHECKING:
    from slipstream.engine.runner import StepRunner


class Engine:
    """A scheduler and a runner, driven by one thread."""

    def __init__(self, scheduler: Scheduler, runner: StepRunner, *, depth: int) -> None:
        self.scheduler = scheduler
        self.runner = runner
        self.depth = depth
        # Why no request is taken at the moment, if none is.
        self.refusal: RequestError | None = None
        self._in_flight: deque[tuple[Any, StepRecord]] = deque()
        self._last_collected_s = 0.0
        # Samples still open of the requests that brought callables.
        self._num_open: dict[str, int] = {}

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    @property
    def can_prepare(self) -> bool:
        """Say whether the time until the next request could be used for it."""
        return not self.has_work and not self._in_flight and self.runner.wants_capture

    def prepare(self) -> None:
        """Do a part of what makes later steps faster; blocks for a part of a second."""
        if self.can_prepare:
            self.runner.capture_wanted()

    def submit(self, request: Request) -> None:
        if self.refusal is not None:
            raise self.refusal
        self.scheduler.submit(request)
        if request.processors:
            self.runner.processors.register(request.request_id, request.processors)
            self._num_open[request.request_id] = request.num_samples

    def abort(self, request_id: str, index: int | None = None) -> list[TokenEvent]:
        return self._let_go(self.scheduler.abort(request_id, index))

    def step(self) -> list[TokenEvent]:
        """End what ran out of time, launch what can be launched, commit the oldest outstanding step."""
        expired = self.scheduler.expire(time.monotonic())
        while len(self._in_flight) < self.depth:
            if self._in_flight and self.runner.needs_host_tokens:
                break
            planned_s = time.monotonic()
            plan = self.scheduler.plan()
            if plan is None:
                break
            record = self._record(plan, planned_s)
            handle = self.runner.launch(plan)
            self.runner.sample(handle)
            record.launched_s = time.monotonic()
            self._in_flight.append((handle, record))
        if not self._in_flight:
            return self._let_go(expired)
        handle, record = self._in_flight.popleft()
        result = self.runner.collect(handle)
        record.collected_s = time.monotonic()
        self._observe(record)
        events = self.scheduler.commit(result)
        record.committed_s = time.monotonic()
        return self._let_go(expired + events)

    def _record(self, plan: StepPlan, planned_s: float) -> StepRecord:
        scheduler = self.scheduler
        num_leading = scheduler.num_leading_spans
        num_rows = len(plan.spans)
        prompts = plan.spans[num_leading:]
        record = StepRecord(
            plan.step_id,
            planned_s,
            scheduled_s=time.monotonic(),
            num_rows=num_rows,
            num_prompts=num_rows - num_leading,
            num_decode_tokens=num_leading,
            num_prefill_tokens=sum([span.len for span in prompts]) if prompts else 0,
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            num_free_pages=scheduler.cache.pool.num_free,
        )
        scheduler.records.add_step(record)
        return record

    def _observe(self, record: StepRecord) -> None:
        """Tell how long a step took, from the end of the one before where both were outstanding."""
        begun_s = max(record.scheduled_s, self._last_collected_s)
        self._last_collected_s = record.collected_s
        if self.scheduler.pacing is not None:
            self.scheduler.pacing.observe(
                num_decodes=record.num_decode_tokens,
                num_prefill_tokens=record.num_prefill_tokens,
                seconds=record.collected_s - begun_s,
            )

    def trace(self) -> EngineTrace:
        """Return what its steps and requests did lately, as plain records."""
        return self.scheduler.records.trace(num_pages=self.scheduler.cache.pool.num_usable)

    def _let_go(self, events: list[TokenEvent]) -> list[TokenEvent]:
        """Drop the callables of requests whose last sample these events end."""
        if self._num_open:
            for event in events:
                if event.finish_reason is not None and event.request_id in self._num_open:
                    self._num_open[event.request_id] -= 1
                    if not self._num_open[event.request_id]:
                        del self._num_open[event.request_id]
                        self.runner.processors.forget(event.request_id)
        return events
