"""How is a timeline written for ui.perfetto.dev and chrome://tracing? As the JSON of the Trace Event Format.

Process 1 is the engine: its steps on the device, what the host does for them, and its counters. Process 2 has
a thread for each request. Times are microseconds.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

from slipstream.trace.timeline import Lane, Step, Timeline

ENGINE, REQUESTS = 1, 2
DEVICE, HOST = 1, 2

Event = dict[str, Any]


def to_perfetto(timeline: Timeline) -> bytes:
    """Return the file's content."""
    events = [*_names(timeline), *_step_events(timeline.steps)]
    for number, lane in enumerate(timeline.lanes, start=1):
        events += _lane_events(lane, number)
    about = {"model": timeline.model, "began": timeline.began}
    return msgspec.json.encode({"traceEvents": events, "displayTimeUnit": "ms", "otherData": about})


def _names(timeline: Timeline) -> Iterator[Event]:
    yield _meta("process_name", ENGINE, 0, f"engine: {timeline.model}")
    yield _meta("process_name", REQUESTS, 0, "requests")
    yield _meta("thread_name", ENGINE, DEVICE, "steps")
    yield _meta("thread_name", ENGINE, HOST, "host")
    for number, lane in enumerate(timeline.lanes, start=1):
        yield _meta("thread_name", REQUESTS, number, _title(lane))


def _title(lane: Lane) -> str:
    return lane.request_id if not lane.index else f"{lane.request_id} [{lane.index}]"


def _meta(what: str, process: int, thread: int, name: str) -> Event:
    return {"ph": "M", "name": what, "pid": process, "tid": thread, "args": {"name": name}}


def _span(process: int, thread: int, name: str, start_s: float, end_s: float, **args: Any) -> Event:
    """One stretch; viewers drop those without a length."""
    return {
        "ph": "X",
        "name": name,
        "pid": process,
        "tid": thread,
        "ts": start_s * 1e6,
        "dur": max(end_s - start_s, 0.0) * 1e6,
        "args": args,
    }


def _step_events(steps: list[Step]) -> Iterator[Event]:
    busy_until_s = 0.0
    for step in steps:
        # The device takes one step at a time: one that is launched early waits for the one before.
        start_s = max(step.scheduled_s, busy_until_s)
        busy_until_s = max(busy_until_s, step.collected_s)
        composition = {
            "step_id": step.step_id,
            "rows": step.num_rows,
            "decode_tokens": step.num_decode_tokens,
            "prefill_tokens": step.num_prefill_tokens,
        }
        yield _span(ENGINE, DEVICE, f"step {step.step_id}", start_s, step.collected_s, **composition)
        yield _span(ENGINE, HOST, "plan", step.planned_s, step.scheduled_s, step_id=step.step_id)
        yield _span(ENGINE, HOST, "launch", step.scheduled_s, step.launched_s, step_id=step.step_id)
        yield _span(ENGINE, HOST, "commit", step.collected_s, step.committed_s, step_id=step.step_id)
        counts = {"running": step.num_running, "waiting": step.num_waiting}
        yield _counter("requests", step.planned_s, **counts)
        yield _counter("KV cache in use", step.planned_s, share=round(step.kv_usage, 6))


def _counter(name: str, at_s: float, **values: float) -> Event:
    return {"ph": "C", "name": name, "pid": ENGINE, "tid": 0, "ts": at_s * 1e6, "args": values}


def _lane_events(lane: Lane, thread: int) -> Iterator[Event]:
    about = {
        "prompt_tokens": lane.num_prompt_tokens,
        "cached_tokens": lane.num_cached_tokens,
        "output_tokens": lane.num_output_tokens,
        "outcome": lane.outcome or "goes on",
    }
    for phase in lane.phases:
        why = {"reason": phase.note} if phase.note else {}
        yield _span(REQUESTS, thread, phase.kind, phase.start_s, phase.end_s, **about, **why)
    for chunk in lane.chunks:
        piece = {"step_id": chunk.step_id, "start": chunk.start, "tokens": chunk.num_tokens}
        name = f"{chunk.num_tokens} tokens"
        yield _span(REQUESTS, thread, name, chunk.start_s, chunk.end_s, **piece)
    if lane.first_token_s is not None:
        yield {
            "ph": "i",
            "s": "t",
            "name": "first token",
            "pid": REQUESTS,
            "tid": thread,
            "ts": lane.first_token_s * 1e6,
        }
