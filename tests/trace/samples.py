"""Which traces do the tests of this room draw? One made by hand, others of an engine over the fake runner."""

from __future__ import annotations

from typing import Any

from slipstream.core.request import Request
from slipstream.core.sampling_params import SamplingParams
from slipstream.engine.engine import Engine
from slipstream.engine.step_records import EngineTrace, RequestEvent, StepRecord
from tests.engine.fake_runner import LIMITS, Replica, full

WHY = "no free page for an earlier request"


def step(step_id: int, at_s: float, **counts: int) -> StepRecord:
    """A step that takes 8 ms from the plan at `at_s` to its result."""
    times = (at_s, at_s + 0.001, at_s + 0.002, at_s + 0.008, at_s + 0.009)
    return StepRecord(step_id, *times, **{"num_free_pages": 75, **counts})


def by_hand() -> EngineTrace:
    """Request "a" runs, is preempted, and ends; "b" waits and goes on; "c" began before the ring's reach."""

    def event(at_s: float, kind: Any, name: str, **rest: Any) -> RequestEvent:
        return RequestEvent(100.0 + at_s, kind, name, 0, **rest)

    steps = [
        step(5, 100.010, num_rows=2, num_prompts=1, num_decode_tokens=1, num_prefill_tokens=16),
        step(6, 100.020, num_rows=2, num_prompts=1, num_decode_tokens=1, num_prefill_tokens=4),
        step(7, 100.030, num_rows=1, num_decode_tokens=1, num_running=1, num_waiting=1),
        step(8, 100.040, num_rows=1, num_prompts=1, num_prefill_tokens=22, num_free_pages=50),
        step(9, 100.050, num_rows=1, num_decode_tokens=1),
    ]
    events = [
        event(0.0, "queued", "a", num_tokens=24),
        event(0.011, "admitted", "a", step_id=5, num_tokens=4),
        event(0.011, "chunk", "a", step_id=5, start=4, num_tokens=16),
        event(0.015, "queued", "b", num_tokens=3),
        event(0.019, "finished", "c", num_tokens=7, reason="stop"),
        event(0.021, "chunk", "a", step_id=6, start=20, num_tokens=4),
        event(0.028, "first_token", "a", step_id=6),
        event(0.035, "preempted", "a", num_tokens=2, reason=WHY),
        event(0.041, "admitted", "a", step_id=8),
        event(0.041, "chunk", "a", step_id=8, num_tokens=22),
        event(0.059, "finished", "a", num_tokens=4, reason="length"),
    ]
    return EngineTrace(
        now_s=100.1, wall_s=1_700_000_000.1, num_pages=100, num_dropped_steps=5, steps=steps, events=events
    )


def of_engine(*, depth: int = 2) -> EngineTrace:
    """Eight requests with a shared prefix in a pool that is too small for them."""
    replica = Replica(full(), num_pages=12, depth=depth, max_batch_size=4, max_num_tokens=16)
    engine = Engine(replica.scheduler, replica.runner, depth=depth)  # type: ignore[arg-type]
    for number in range(8):
        params = SamplingParams(max_tokens=30, seed=7)
        prompt = [*range(2, 14), 100 + number]
        replica.scheduler.submit(Request.create(prompt, params, LIMITS, request_id=f"r{number}"))
    while engine.has_work:
        engine.step()
    return engine.trace()
