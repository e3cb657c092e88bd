"""What has the engine done lately, step by step and request by request? A ring, always on, never in the way.

A step is one `StepRecord`, filled in as it is planned, launched, collected and committed; what happens to a
request on the way is a `RequestEvent`. Nothing is recorded per token: between a first token and an end, the
steps tell. Times are seconds on the monotonic clock of the engine's process.
Invariant: memory is bounded: `MAX_STEPS` steps and `MAX_EVENTS` events take less than 16 MiB, request ids
of the usual length included, and the oldest go first.
"""

from __future__ import annotations

import time
from collections import deque
from typing import Any, Literal

import msgspec

MAX_STEPS = 8192
MAX_EVENTS = 32768

EventKind = Literal["queued", "admitted", "chunk", "first_token", "preempted", "finished"]


class StepRecord(msgspec.Struct, gc=False):
    """One step. A time is 0 until it has come.

    `planned_s` is when its planning began, `scheduled_s` when the plan was made, `launched_s` when the device
    had it (a CPU has computed it by then), `collected_s` when its result was there, `committed_s` when the
    result was taken in. `num_rows` counts rows in the step, `num_prompts` those that ran a piece of their
    prompt, `num_prefill_tokens` together; counts of requests and free pages are of the moment after the plan.
    """

    step_id: int
    planned_s: float
    scheduled_s: float = 0.0
    launched_s: float = 0.0
    collected_s: float = 0.0
    committed_s: float = 0.0
    num_rows: int = 0
    num_prompts: int = 0
    num_decode_tokens: int = 0
    num_prefill_tokens: int = 0
    num_running: int = 0
    num_waiting: int = 0
    num_free_pages: int = 0


class RequestEvent(msgspec.Struct, gc=False):
    """One thing that happened to sample `index` of a request, in or before step `step_id` (-1: in none).

    `num_tokens` is of the prompt (queued), found in the cache (admitted), of the piece of the prompt that
    begins at `start` (chunk), or generated so far (preempted, finished). `reason` says why it was preempted
    or finished.
    """

    at_s: float
    kind: EventKind
    request_id: str
    index: int
    step_id: int = -1
    start: int = 0
    num_tokens: int = 0
    reason: str = ""


class EngineTrace(msgspec.Struct):
    """The ring as it stands: what crosses to another process, and what a trace file holds.

    `wall_s` is the wall clock's time where the monotonic one shows `now_s`. `num_dropped_steps` and
    `num_dropped_events` have left the ring.
    """

    now_s: float
    wall_s: float
    num_pages: int
    num_dropped_steps: int = 0
    num_dropped_events: int = 0
    steps: list[StepRecord] = []
    events: list[RequestEvent] = []


class StepRecords:
    """The ring of one engine; written by its thread alone."""

    def __init__(self, *, max_steps: int = MAX_STEPS, max_events: int = MAX_EVENTS) -> None:
        self._steps: deque[StepRecord] = deque(maxlen=max_steps)
        self._events: deque[RequestEvent] = deque(maxlen=max_events)
        self._num_steps = 0
        self._num_events = 0

    def add_step(self, record: StepRecord) -> None:
        """Take a step in at its launch; whoever made the record fills in the rest later."""
        self._steps.append(record)
        self._num_steps += 1

    def add_event(
        self,
        kind: EventKind,
        request: Any,
        *,
        at_s: float | None = None,
        step_id: int = -1,
        start: int = 0,
        num_tokens: int = 0,
        reason: str = "",
    ) -> None:
        """Note what happened to one sample, a `Request` of its own, now or at `at_s`."""
        at_s = time.monotonic() if at_s is None else at_s
        self._events.append(
            RequestEvent(
                at_s, kind, request.request_id, request.sample_idx, step_id, start, num_tokens, reason
            )
        )
        self._num_events += 1

    def clear(self) -> None:
        """Forget everything, as if nothing had run."""
        self._steps.clear()
        self._events.clear()
        self._num_steps = self._num_events = 0

    def trace(self, *, num_pages: int) -> EngineTrace:
        """Copy the ring out, events in the order of their times."""
        return EngineTrace(
            now_s=time.monotonic(),
            wall_s=time.time(),
            num_pages=num_pages,
            num_dropped_steps=self._num_steps - len(self._steps),
            num_dropped_events=self._num_events - len(self._events),
            steps=[msgspec.structs.replace(step) for step in self._steps],
            events=sorted(self._events, key=lambda event: event.at_s),
        )
