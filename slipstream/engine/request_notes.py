"""How did a request come to its tokens? What the scheduler notes of it, for the ring and for its last event.

Invariant: nothing here costs a step that neither admits nor ends a request, and nothing is decided here.
"""

from __future__ import annotations

import time
from collections.abc import Sequence as Events

from slipstream.core.outputs import TokenEvent
from slipstream.core.request import Request
from slipstream.engine.sequence import Sequence
from slipstream.engine.step_records import StepRecords

# Why a request is preempted.
SHORT_OF_PAGES = "no free page for an earlier request"
READ_BAD_PAGES = "it read pages that hold wrong numbers"


class RequestNotes:
    """Writes `records`, and says with a request's events how it came to them."""

    def __init__(self, records: StepRecords) -> None:
        self.records = records
        self._commit_s = 0.0
        # Who samples the first token after an admission, by step.
        self._prefilled: dict[int, list[Sequence]] = {}

    def queued(self, sample: Request) -> None:
        # It waited for the last step to end before it came here. Another process's clock may run ahead.
        at_s = min(sample.arrival_s, time.monotonic())
        self.records.add_event("queued", sample, at_s=at_s, num_tokens=len(sample.prompt_token_ids))

    def admitted(self, sequence: Sequence, *, step_id: int, num_cached: int) -> None:
        now = time.monotonic()
        if sequence.admitted_s is None:
            sequence.admitted_s = now
        self.records.add_event("admitted", sequence.request, at_s=now, step_id=step_id, num_tokens=num_cached)

    def chunk(self, sequence: Sequence, *, step_id: int, start: int, num_tokens: int) -> None:
        self.records.add_event("chunk", sequence.request, step_id=step_id, start=start, num_tokens=num_tokens)

    def prefilled(self, sequence: Sequence, *, step_id: int) -> None:
        """Expect a token of a sequence from this step: its first since it was admitted."""
        self._prefilled.setdefault(step_id, []).append(sequence)

    def preempted(self, sequence: Sequence, reason: str) -> None:
        self.records.add_event("preempted", sequence.request, num_tokens=sequence.num_output, reason=reason)

    def finished(self, sequence: Sequence, reason: str) -> None:
        self.records.add_event("finished", sequence.request, num_tokens=sequence.num_output, reason=reason)

    def begin_commit(self) -> None:
        """Take the time at which a step's tokens came, before any of them ends a request."""
        self._commit_s = time.monotonic()

    def committed(self, step_id: int, events: Events[TokenEvent]) -> None:
        """Note whose first tokens these are, and tell their way now: a stop string may end them elsewhere."""
        sequences = self._prefilled.pop(step_id, None)
        if sequences is None:
            return
        by_key = {(event.request_id, event.index): event for event in events}
        for sequence in sequences:
            request = sequence.request
            event = by_key.get((request.request_id, request.sample_idx))
            if event is not None and event.new_token_ids:
                describe_way(event, sequence)
            search = None if sequence.group is None else sequence.group.search
            if (sequence.num_output if search is None else search.num_steps) == 1:
                self.records.add_event("first_token", request, at_s=self._commit_s, step_id=step_id)


def describe_way(event: TokenEvent, sequence: Sequence) -> None:
    """Fill in the fields of an event that say how its sample came to it."""
    event.num_cached_tokens = max(0, sequence.num_cached_tokens)
    event.admitted_s = sequence.admitted_s
    event.num_preemptions = sequence.num_preemptions
