"""What did each request go through, and what did the engine do meanwhile? From records to lanes and curves.

Times are seconds from the first moment that the ring still holds. A phase whose beginning has left the ring
begins at 0; one that goes on ends with the trace.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Mapping
from typing import Literal

import msgspec

from slipstream.engine.step_records import EngineTrace, RequestEvent, StepRecord

PhaseKind = Literal["queued", "prefill", "decode", "preempted"]
# What a request was doing before the first event of it that the ring holds.
BEFORE: Mapping[str, PhaseKind] = {
    "admitted": "queued",
    "chunk": "prefill",
    "first_token": "prefill",
    "preempted": "decode",
    "finished": "decode",
}


class Phase(msgspec.Struct):
    """A stretch of a request's life; `note` says why it is preempted."""

    kind: PhaseKind
    start_s: float
    end_s: float
    note: str = ""


class Chunk(msgspec.Struct):
    """A piece of a prompt, while the step that ran it ran."""

    step_id: int
    start_s: float
    end_s: float
    start: int
    num_tokens: int


class Lane(msgspec.Struct):
    """One sample of one request. `outcome` is how it ended, "" while it goes on; None is not known."""

    request_id: str
    index: int
    phases: list[Phase] = []
    chunks: list[Chunk] = []
    num_prompt_tokens: int | None = None
    num_cached_tokens: int | None = None
    num_output_tokens: int | None = None
    num_preemptions: int = 0
    queued_s: float | None = None
    first_token_s: float | None = None
    outcome: str = ""
    is_cut: bool = False

    @property
    def ttft_s(self) -> float | None:
        if self.queued_s is None or self.first_token_s is None:
            return None
        return self.first_token_s - self.queued_s


class Step(msgspec.Struct):
    """One step. `kv_usage` is the share of pages in use after it was planned."""

    step_id: int
    planned_s: float
    scheduled_s: float
    launched_s: float
    collected_s: float
    committed_s: float
    num_rows: int
    num_decode_tokens: int
    num_prefill_tokens: int
    num_running: int
    num_waiting: int
    kv_usage: float


class Timeline(msgspec.Struct):
    """Everything a page shows. `began` is the wall clock's time at 0, as ISO 8601 in UTC."""

    model: str
    began: str
    duration_s: float
    num_pages: int
    lanes: list[Lane]
    steps: list[Step]
    num_dropped_steps: int = 0
    num_dropped_events: int = 0


def timeline_of(trace: EngineTrace, *, model: str) -> Timeline:
    """Draw the lines between what a trace holds."""
    start_s = min(
        [trace.now_s, *(step.planned_s for step in trace.steps), *(event.at_s for event in trace.events)]
    )
    end_s = _end_of(trace)
    steps = [_step(record, start_s, end_s, trace.num_pages) for record in trace.steps]
    began = datetime.datetime.fromtimestamp(trace.wall_s - (trace.now_s - start_s), tz=datetime.UTC)
    return Timeline(
        model=model,
        began=began.isoformat(timespec="milliseconds"),
        duration_s=end_s - start_s,
        num_pages=trace.num_pages,
        lanes=_lanes(trace.events, {step.step_id: step for step in steps}, start_s, end_s),
        steps=steps,
        num_dropped_steps=trace.num_dropped_steps,
        num_dropped_events=trace.num_dropped_events,
    )


def _end_of(trace: EngineTrace) -> float:
    """Return when the last thing happened; an engine that idles since is not drawn idling."""
    is_busy = any(not step.committed_s for step in trace.steps)
    ended = {(event.request_id, event.index) for event in trace.events if event.kind == "finished"}
    is_busy = is_busy or any((event.request_id, event.index) not in ended for event in trace.events)
    if is_busy:
        return trace.now_s
    last = [*(step.committed_s for step in trace.steps), *(event.at_s for event in trace.events)]
    return max(last, default=trace.now_s)


def _step(record: StepRecord, start_s: float, end_s: float, num_pages: int) -> Step:
    def when(at_s: float) -> float:
        # What has not happened yet goes on to the end.
        return (at_s or end_s) - start_s

    return Step(
        step_id=record.step_id,
        planned_s=when(record.planned_s),
        scheduled_s=when(record.scheduled_s),
        launched_s=when(record.launched_s),
        collected_s=when(record.collected_s),
        committed_s=when(record.committed_s),
        num_rows=record.num_rows,
        num_decode_tokens=record.num_decode_tokens,
        num_prefill_tokens=record.num_prefill_tokens,
        num_running=record.num_running,
        num_waiting=record.num_waiting,
        kv_usage=1.0 - record.num_free_pages / num_pages if num_pages else 0.0,
    )


def _lanes(
    events: Iterable[RequestEvent], steps: Mapping[int, Step], start_s: float, end_s: float
) -> list[Lane]:
    """Sort events into lanes, in the order in which the requests came."""
    drafts: dict[tuple[str, int], LaneDraft] = {}
    for event in events:
        key = (event.request_id, event.index)
        if key not in drafts or (event.kind == "queued" and drafts[key].lane.outcome):
            # Ids are used again after their end; the older lane stays under a key of its own.
            if key in drafts:
                drafts[(f"{event.request_id}\0{len(drafts)}", event.index)] = drafts.pop(key)
            drafts[key] = LaneDraft(Lane(event.request_id, event.index), steps)
        drafts[key].take(event, event.at_s - start_s)
    lanes = [draft.finish(end_s - start_s) for draft in drafts.values()]
    return sorted(lanes, key=lambda lane: (lane.phases[0].start_s if lane.phases else 0.0, lane.index))


class LaneDraft:
    """A lane while its events are read, in the order of their times."""

    def __init__(self, lane: Lane, steps: Mapping[int, Step]) -> None:
        self.lane = lane
        self._steps = steps

    def take(self, event: RequestEvent, at_s: float) -> None:
        lane = self.lane
        if lane.outcome:
            return
        if not lane.phases and event.kind != "queued":
            lane.is_cut = True
            lane.phases.append(Phase(BEFORE[event.kind], 0.0, 0.0))
        match event.kind:
            case "queued":
                lane.queued_s = at_s
                lane.num_prompt_tokens = event.num_tokens
                self._begin("queued", at_s)
            case "admitted":
                if lane.num_cached_tokens is None:
                    lane.num_cached_tokens = event.num_tokens
                self._begin("prefill", at_s)
            case "chunk":
                lane.chunks.append(self._chunk(event, at_s))
            case "first_token":
                lane.first_token_s = at_s
                self._begin("decode", at_s)
            case "preempted":
                lane.num_preemptions += 1
                self._begin("preempted", at_s, event.reason)
            case "finished":
                lane.outcome = event.reason
                lane.num_output_tokens = event.num_tokens
                self._end(at_s)

    def _chunk(self, event: RequestEvent, at_s: float) -> Chunk:
        step = self._steps.get(event.step_id)
        start_s, end_s = (at_s, at_s) if step is None else (step.scheduled_s, step.collected_s)
        return Chunk(event.step_id, start_s, end_s, event.start, event.num_tokens)

    def _begin(self, kind: PhaseKind, at_s: float, note: str = "") -> None:
        self._end(at_s)
        self.lane.phases.append(Phase(kind, at_s, at_s, note))

    def _end(self, at_s: float) -> None:
        if self.lane.phases:
            self.lane.phases[-1].end_s = at_s

    def finish(self, end_s: float) -> Lane:
        """Close the lane; a prompt that was computed anew after a preemption goes on decoding after it."""
        lane = self.lane
        if not lane.outcome:
            self._end(end_s)
        lane.phases = [phase for whole in lane.phases for phase in self._split(whole)]
        return lane

    def _split(self, phase: Phase) -> list[Phase]:
        """Divide prefill after the first token into what is computed again and what is generated."""
        first_token_s = self.lane.first_token_s
        if phase.kind != "prefill" or first_token_s is None or phase.start_s < first_token_s:
            return [phase]
        inside = [chunk.end_s for chunk in self.lane.chunks if phase.start_s <= chunk.end_s <= phase.end_s]
        again_s = max(inside, default=phase.start_s)
        return [Phase("prefill", phase.start_s, again_s), Phase("decode", again_s, phase.end_s)]
