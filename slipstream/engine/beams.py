"""How does a beam search run on rows and pages? Its beams are forks over shared blocks.

The prompt is computed once. Each commit brings how every beam could go on, the search picks (parent, token)
pairs, and the next plan is their difference to what stands on the device: the first child of a beam keeps
its row and overwrites the sampled token; further children get rows, share the whole blocks and copy the one
begun; beams without a child leave.
Invariants: the beams of a search step together or not at all, and not before their last step is committed, so
their neighbours may overlap freely; rows for all of them are kept back from admission to the end. Shared
blocks after PagedAttention (arXiv:2309.06180, section 4.4).
"""

from __future__ import annotations

import dataclasses
from typing import Any

from slipstream.cache.kv_cache import KvCache
from slipstream.core.outputs import FinishReason, TokenEvent
from slipstream.core.plan import Span, StepPlan, StepResult, TokenLogprobs
from slipstream.core.request import Request
from slipstream.engine.beam_search import Hypothesis
from slipstream.engine.row_allocation import RowAllocation
from slipstream.engine.sequence import BeamGroup, Sequence, State

Entry = tuple[int, Sequence, int]


@dataclasses.dataclass(frozen=True, slots=True)
class StepNote:
    """What one beam's step brought beside candidates: the leading tokens, and its logits where wanted."""

    top: list[tuple[int, float]]
    extras: list[Any]


class Beams:
    """The searches that run. Searches that wait are sequences like any other."""

    def __init__(self, cache: KvCache, rows: RowAllocation) -> None:
        self._cache = cache
        self._rows = rows
        self._groups: dict[BeamGroup, None] = {}

    def ready(self) -> list[BeamGroup]:
        """Return the searches past their prompt whose next step may be planned."""
        return [group for group in self._groups if group.search.num_steps and not group.is_in_flight]

    def start(self, group: BeamGroup) -> None:
        """Note that a root has got its row, and keep back those of its forks."""
        self._groups[group] = None
        self._rows.num_reserved += group.width - 1

    def leaving(self, sequence: Sequence) -> list[Sequence]:
        """Return every sequence that is to leave its row where this one does; a search then runs no more."""
        group = sequence.group
        if group is None:
            return [sequence]
        del self._groups[group]
        placed = group.placed
        self._rows.num_reserved -= group.width - len(placed)
        return placed

    def pages_missing(self, group: BeamGroup) -> int:
        """Publish and trim what the search has computed; return how many pages its next step takes."""
        num_new = len(group.forks)
        for beam in group.placed:
            start = beam.num_scheduled
            self._cache.publish(beam.table, beam.tokens, start, step_id=beam.last_step)
            if start >= beam.table.capacity:
                self._cache.trim(beam.table, start, after_step=beam.last_step)
                num_new += 1
        return num_new * len(self._cache.groups)

    def plan(self, plan: StepPlan, entries: list[Entry], group: BeamGroup) -> int:
        """Put the next step of a search into the plan; returns how many blocks are copied.

        The pool has the pages that `pages_missing` named.
        """
        num_copies = 0
        for child, parent in group.forks:
            num_copies += self._fork(plan, child, parent)
        forked = {child for child, _ in group.forks}
        group.forks = []
        for beam in group.beams:
            if beam not in forked:
                self._go_on(plan, beam)
            start = beam.num_scheduled
            plan.spans.append(Span(beam.row, start, 1))
            plan.sample.append(beam.row)
            beam.num_scheduled = start + 1
            beam.num_in_flight += 1
            beam.last_step = plan.step_id
            entries.append((beam.row, beam, start + 1))
            if beam.wants_generation_logits:
                plan.logits.append((beam.row, start, 1, "generation_logits"))
        group.is_in_flight = True
        return num_copies

    def _fork(self, plan: StepPlan, child: Sequence, parent: Sequence) -> bool:
        start = parent.num_scheduled
        copies = self._cache.fork(child.table, parent.table, start, step_id=plan.step_id)
        assert copies is not None, "the pages of a step are counted before it is planned"
        plan.copies += copies
        self._rows.start_fork(child)
        child.num_scheduled = child.num_computed = child.prefill_end = start
        plan.added.append(child.to_init())
        return bool(child.table.copied)

    def _go_on(self, plan: StepPlan, beam: Sequence) -> None:
        """Let a beam keep its row with the token that was picked, whatever was sampled there."""
        start = beam.num_scheduled
        plan.tokens.append((beam.row, start, [beam.tokens[start]]))
        if start < beam.table.capacity:
            return
        grown = self._cache.extend(beam.table, start + 1)
        assert grown is not None, "the pages of a step are counted before it is planned"
        plan.copies += self._cache.zeroing(grown)
        for group, pages in enumerate(grown):
            plan.new_blocks.setdefault(group, []).append((beam.row, pages))

    def commit(self, group: BeamGroup, result: StepResult) -> list[TokenEvent]:
        """Take in a step of all beams of a search; returns the events of its end, if this was it."""
        group.is_in_flight = False
        rows = [beam.row for beam in group.beams]
        parents = group.search.advance(
            [result.candidates[row] for row in rows], [_note_of(result, row) for row in rows]
        )
        if group.search.is_done:
            return outcomes(group, None)
        self._assign(group, parents)
        return []

    def _assign(self, group: BeamGroup, parents: list[int]) -> None:
        """Give each live hypothesis a beam: its parent's, or a fork of it; beams without a child leave."""
        old = group.beams
        for place, beam in enumerate(old):
            if place not in parents:
                self._drop(group, beam)
        group.beams = []
        continued: set[int] = set()
        for place, hypothesis in zip(parents, group.search.live, strict=True):
            parent = beam = old[place]
            if place in continued:
                beam = self._new_beam(group, parent)
                group.forks.append((beam, parent))
            continued.add(place)
            beam.tokens.append(hypothesis.token)
            group.beams.append(beam)

    def _drop(self, group: BeamGroup, beam: Sequence) -> None:
        self._rows.leave(beam)
        self._rows.num_reserved += 1
        self._cache.release(beam.table, after_step=beam.last_step)
        if beam is not group.root:
            beam.state = State.FINISHED

    def _new_beam(self, group: BeamGroup, parent: Sequence) -> Sequence:
        request = group.root.request
        beam = Sequence(request, group.root.order, new_table(self._cache, request))
        beam.group = group
        beam.state = State.RUNNING
        beam.admission = parent.admission
        # The parent may have its next token already.
        beam.tokens = parent.tokens[: parent.num_scheduled]
        return beam

    def restart(self, group: BeamGroup) -> Sequence:
        """Begin a search that has left its rows anew: its root, ready to wait, is returned.

        What is in flight for it is dropped. The search comes to the same end, since it depends on nothing but
        the request; blocks that its beams have published spare it work where they are still there.
        """
        root = group.root
        through = max(beam.last_step for beam in (root, *group.beams))
        for beam in group.beams:
            if beam is not root:
                beam.state = State.FINISHED
        root.last_step = group.discard_through = through
        del root.tokens[root.num_prompt :]
        del root.table.keys[root.num_prompt // self._cache.block_tokens :]
        group.restart()
        return root


def new_table(cache: KvCache, request: Request) -> Any:
    """Return the empty block table of one sequence of a request."""
    return cache.new_table(
        salt=request.cache_salt,
        retention=request.kv_retention,
        num_prompt=len(request.prompt_token_ids),
    )


def _note_of(result: StepResult, row: int) -> StepNote:
    logprobs = result.logprobs.get(row)
    extras = [extra for extra in result.extras.get(row, ()) if extra[0] == "generation_logits"]
    return StepNote(logprobs[0].top if logprobs else [], extras)


def outcomes(group: BeamGroup, reason: FinishReason | None) -> list[TokenEvent]:
    """Return the last event of each of the n outputs, best first, as the search has them now.

    `reason` is why it is cut off; None where it came to its own end.
    """
    request = group.root.request
    best = group.search.best(request.num_returned)
    events = [_outcome(group, index, hypothesis, reason) for index, hypothesis in enumerate(best)]
    for index in range(len(best), request.num_returned):
        event = TokenEvent(request.request_id, index, finish_reason=reason or "error")
        event.num_cached_tokens = max(0, group.root.num_cached_tokens)
        if reason is None:
            what = f"the search found only {len(best)} of {request.num_returned} outputs: allow more tokens"
            event.error = (what, "invalid_request")
        events.append(event)
    return events


def _outcome(group: BeamGroup, index: int, hypothesis: Hypothesis, reason: FinishReason | None) -> TokenEvent:
    request = group.root.request
    path = hypothesis.path()
    is_stop = reason is None and hypothesis.token in request.stop_token_ids
    event = TokenEvent(
        request.request_id,
        index,
        [step.token for step in path],
        finish_reason=reason or ("stop" if is_stop else "length"),
        stop_reason=hypothesis.token if is_stop else None,
        num_cached_tokens=max(0, group.root.num_cached_tokens),
        cumulative_logprob=hypothesis.total,
        extras=[extra for step in path for extra in step.note.extras],
    )
    if request.sampling.logprobs >= 0:
        event.logprobs = [TokenLogprobs(step.token, step.logprob, step.rank, step.note.top) for step in path]
    return event
