"""What runs in the next step, and what did the last one bring? `plan` and `commit`, over integers only.

Invariants: the scheduler owns rows and pages; a plan names only pages that no outstanding step or transfer
still needs for something else; running rows come before new ones; the last in the order of (priority,
arrival) is preempted first and returns to its place, so the first in that order always advances. Continuous
batching after Orca (Yu et al., OSDI 2022), chunked prefill after Sarathi-Serve (arXiv:2403.02310), paging
after PagedAttention (arXiv:2309.06180); departures: plans are deltas, and requests that share a prefix being
computed wait for it.
"""

from __future__ import annotations

import heapq
from collections import deque
from typing import Any

from slipstream.cache.kv_cache import NO_HIT, Hit, KvCache
from slipstream.cache.kv_events import Event
from slipstream.core.errors import RequestError
from slipstream.core.outputs import FinishReason, TokenEvent
from slipstream.core.plan import Span, StepPlan, StepResult
from slipstream.core.request import Request
from slipstream.engine.admission import POLICIES, MaxUtilization
from slipstream.engine.beams import Beams, new_table, outcomes
from slipstream.engine.chunking import POLICIES as CHUNKING_POLICIES
from slipstream.engine.chunking import FirstComeFirstServed
from slipstream.engine.pacing import Pacing
from slipstream.engine.request_notes import READ_BAD_PAGES, SHORT_OF_PAGES, RequestNotes, describe_way
from slipstream.engine.row_allocation import RowAllocation
from slipstream.engine.scheduler_stats import SchedulerStats
from slipstream.engine.sequence import BeamGroup, Sequence, State
from slipstream.engine.step_records import StepRecords
from slipstream.engine.waiting_queue import WaitingQueue

# Requests that may be parked per row: a plan looks at no more of the queue, however many share a prefix.
MAX_PARKED_PER_ROW = 4
# Deadlines of ended requests are forgotten once there are more of them than this and than running ones.
MIN_DEADLINES = 64


class Scheduler:
    """Plans steps of at most `max_num_tokens` tokens over at most `max_batch_size` rows."""

    def __init__(
        self,
        cache: KvCache,
        *,
        max_batch_size: int,
        max_num_tokens: int,
        enable_chunked_prefill: bool = True,
        policy: str = "MAX_UTILIZATION",
        chunking_policy: str = "FIRST_COME_FIRST_SERVED",
        pacing: Pacing | None = None,
    ) -> None:
        self.cache = cache
        self.stats = SchedulerStats()
        self.records = StepRecords()
        # Spans of the newest plan that stand before its pieces of prompts.
        self.num_leading_spans = 0
        self._max_num_tokens = max_num_tokens
        self._enable_chunked_prefill = enable_chunked_prefill
        self._sequences: dict[tuple[str, int], Sequence] = {}
        self._queue = WaitingQueue(max_parked=MAX_PARKED_PER_ROW * max_batch_size)
        self._rows = RowAllocation(max_batch_size)
        self._beams = Beams(cache, self._rows)
        self._admission: MaxUtilization = POLICIES.get(policy)(
            cache, self._rows, max_num_tokens=max_num_tokens, enable_chunked_prefill=enable_chunked_prefill
        )
        self._chunking: FirstComeFirstServed = CHUNKING_POLICIES.get(chunking_policy)()
        self.pacing = pacing
        self._deadlines: list[tuple[float, tuple[int, int], Sequence]] = []
        self._outstanding: deque[tuple[int, list[tuple[int, Sequence, int]]]] = deque()
        self._notes = RequestNotes(self.records)
        self._next_arrival = 0
        self._next_step_id = 0
        self._last_committed = -1
        self._is_short = False

    @property
    def num_waiting(self) -> int:
        return len(self._queue)

    @property
    def num_running(self) -> int:
        return len(self._rows)

    @property
    def num_outstanding(self) -> int:
        return len(self._outstanding)

    @property
    def has_work(self) -> bool:
        return bool(self._sequences or self._outstanding)

    def running(self) -> list[Sequence]:
        return self._rows.running()

    def submit(self, request: Request) -> None:
        """Queue every sample of a request; raises RequestError where it can never fit."""
        self._admission.check_fits(request)
        for sample in request.samples():
            key = (sample.request_id, sample.sample_idx)
            if key in self._sequences:
                raise RequestError(
                    f"Request id {request.request_id!r} is in use; ids must be unique while they run.",
                    param="request_id",
                )
            sequence = Sequence(sample, (sample.priority, self._next_arrival), new_table(self.cache, sample))
            if sample.beams is not None:
                sequence.group = BeamGroup(sequence, sample.beams.width)
            self._next_arrival += 1
            self._sequences[key] = sequence
            self._queue.push(sequence)
            self._notes.queued(sample)
            if sample.deadline_s is not None:
                self._note_deadline(sample.deadline_s, sequence)

    def _note_deadline(self, deadline_s: float, sequence: Sequence) -> None:
        heapq.heappush(self._deadlines, (deadline_s, sequence.order, sequence))
        if len(self._deadlines) > 2 * len(self._sequences) + MIN_DEADLINES:
            # Most have ended long before their deadline: let go of them.
            self._deadlines = [entry for entry in self._deadlines if entry[2].state is not State.FINISHED]
            heapq.heapify(self._deadlines)

    def abort(self, request_id: str, index: int | None = None) -> list[TokenEvent]:
        """End a request (or its sample `index`) now, wherever it is; unknown or finished ids are ignored."""
        events: list[TokenEvent] = []
        indices = [index] if index is not None else [i for r, i in self._sequences if r == request_id]
        for sample_idx in indices:
            sequence = self._sequences.get((request_id, sample_idx))
            if sequence is not None:
                events += self._end(sequence, "cancelled")
        return events

    def expire(self, now_s: float) -> list[TokenEvent]:
        """End every request whose deadline (monotonic seconds) has passed, wherever it is."""
        events: list[TokenEvent] = []
        while self._deadlines and self._deadlines[0][0] <= now_s:
            sequence = heapq.heappop(self._deadlines)[2]
            if sequence.state is not State.FINISHED:
                events += self._end(sequence, "timeout")
        return events

    def drain_kv_events(self) -> list[Event]:
        """Return what became findable in the cache or was forgotten since the last call."""
        return self.cache.drain_kv_events()

    def plan(self) -> StepPlan | None:
        """Return the next step, or None where nothing can run before an outstanding step is committed."""
        plan = self._plan_step()
        while plan is None and self._is_short and not self._outstanding:
            # Only a preemption came of it; no step names the victim's pages, so others can have them now.
            plan = self._plan_step()
        return plan

    def _plan_step(self) -> StepPlan | None:
        self._queue.wake_tails()
        self._admission.begin_plan()
        removed = self._rows.begin_plan()
        plan = StepPlan(self._next_step_id)
        entries: list[tuple[int, Sequence, int]] = []
        self._is_short = False
        self._plan_decodes(plan, entries)
        self._plan_beams(plan, entries)
        budget = self._max_num_tokens - len(plan.spans)
        num_decodes = self.num_leading_spans = len(plan.spans)
        budget = offered = self._paced(budget, num_decodes)
        budget = self._plan_chunks(plan, entries, budget)
        if not self._is_short:
            budget = self._plan_admissions(plan, entries, budget)
        if not plan.spans:
            self._rows.cancel_plan(removed)
            return None
        plan.removed = removed
        # Short spans first: backends take the leading rows of one token together.
        plan.spans[num_decodes:] = sorted(plan.spans[num_decodes:], key=lambda span: span.len)
        self._next_step_id += 1
        self._outstanding.append((plan.step_id, entries))
        stats = self.stats
        stats.num_plans += 1
        stats.num_planned_tokens += num_decodes + offered - budget
        stats.max_prompts_per_step = max(stats.max_prompts_per_step, len(plan.spans) - num_decodes)
        stats.max_outstanding = max(stats.max_outstanding, len(self._outstanding))
        return plan

    def _paced(self, budget: int, num_decodes: int) -> int:
        """Return how many of `budget` tokens prompts may have beside decoding rows."""
        if self.pacing is None or not num_decodes:
            return budget
        num_prompts = len(self._rows.prefilling) + len(self._queue)
        allowed = self.pacing.budget(num_decodes=num_decodes, num_prompts=num_prompts)
        if allowed is None or not self._enable_chunked_prefill:
            return budget
        return min(budget, allowed)

    def _plan_decodes(self, plan: StepPlan, entries: list[tuple[int, Sequence, int]]) -> None:
        """Give every decoding row one token. This loop is the host's cost at a large batch: keep it flat."""
        step_id = plan.step_id
        add_span, add_sample, add_entry = plan.spans.append, plan.sample.append, entries.append
        for row, sequence in list(self._rows.decoding.items()):
            start = sequence.num_scheduled
            if start > sequence.last_decode_start or sequence.row != row:
                continue
            if start >= sequence.table.capacity and not self._grow_decode(plan, sequence, start):
                continue
            add_span(Span(row, start, 1))
            add_sample(row)
            sequence.num_scheduled = start + 1
            sequence.num_in_flight += 1
            sequence.last_step = step_id
            add_entry((row, sequence, start + 1))
            if sequence.wants_generation_logits:
                plan.logits.append((row, start, 1, "generation_logits"))

    def _grow_decode(self, plan: StepPlan, sequence: Sequence, start: int) -> bool:
        """Take the next block of a decoding row (once every block_tokens steps); False if it must wait."""
        table = sequence.table
        self.cache.publish(table, sequence.tokens, start, step_id=sequence.last_step)
        self.cache.trim(table, start, after_step=sequence.last_step)
        return self._extend(plan, sequence, start + 1)

    def _extend(self, plan: StepPlan, sequence: Sequence, num_tokens: int) -> bool:
        """Give a running row pages for `num_tokens`, or note that it is short and make room for later."""
        table = sequence.table
        if num_tokens <= table.capacity:
            return True
        grown = None if self._is_short else self.cache.extend(table, num_tokens)
        if grown is None:
            self._make_room()
            return False
        plan.copies += self.cache.zeroing(grown)
        for group, pages in enumerate(grown):
            if pages:
                plan.new_blocks.setdefault(group, []).append((sequence.row, pages))
        return True

    def _plan_beams(self, plan: StepPlan, entries: list[tuple[int, Sequence, int]]) -> None:
        """Give all beams of each search one token, or none of them where the pool is short."""
        for group in self._beams.ready():
            if group.root.state is not State.RUNNING:
                continue
            needed = self._beams.pages_missing(group)
            if needed and (self._is_short or needed > self.cache.pool.num_free):
                self._make_room()
            else:
                self.stats.num_copied_blocks += self._beams.plan(plan, entries, group)

    def _make_room(self) -> None:
        """Preempt the last in order, unless pages are already on their way back."""
        self.stats.num_short_rows += 1
        is_first, self._is_short = not self._is_short, True
        if is_first and not self.cache.pool.num_retiring:
            self._preempt(max(self.running(), key=lambda running: running.order))

    def _plan_chunks(self, plan: StepPlan, entries: list[tuple[int, Sequence, int]], budget: int) -> int:
        """Continue the prompts that earlier plans began, each by its share; returns the tokens left."""
        num_prompts = len(self._rows.prefilling) + self._num_admissible()
        for sequence in self._chunking.ordered(self._rows.prefilling):
            if budget <= 0:
                break
            if sequence.state is not State.RUNNING:
                continue
            start = sequence.num_scheduled
            self.cache.trim(sequence.table, start, after_step=sequence.last_step)
            room = sequence.table.capacity - start
            if not self._is_short:
                room += self.cache.num_free_tokens
            share = self._chunking.share(budget, num_prompts)
            num_prompts -= 1
            chunk = min(share, sequence.prefill_end - start, room)
            if chunk <= 0:
                self._make_room()
            elif self._extend(plan, sequence, start + chunk):
                self._plan_chunk(plan, entries, sequence, chunk)
                budget -= chunk
        return budget

    def _num_admissible(self) -> int:
        """Return how many waiting prompts this plan may come to admit, at most."""
        head = self._queue.head()
        if self._is_short or head is None or not self._admission.may_look(head):
            return 0
        return min(self._queue.num_ready, self._rows.num_free)

    def _plan_chunk(
        self, plan: StepPlan, entries: list[tuple[int, Sequence, int]], sequence: Sequence, chunk: int
    ) -> None:
        """Put `chunk` prompt tokens of a row into the plan and publish the blocks they complete."""
        start = sequence.num_scheduled
        end = start + chunk
        plan.spans.append(Span(sequence.row, start, chunk))
        sequence.num_scheduled = end
        sequence.last_step = plan.step_id
        entries.append((sequence.row, sequence, end))
        self.stats.num_chunks += 1
        self._notes.chunk(sequence, step_id=plan.step_id, start=start, num_tokens=chunk)
        plan.logits += sequence.logits_of_chunk(start, chunk)
        self._publish(sequence, plan.step_id)
        if end == sequence.prefill_end:
            self._rows.begin_decoding(sequence)
            if sequence.request.max_tokens:
                plan.sample.append(sequence.row)
                sequence.num_in_flight += 1
                self._notes.prefilled(sequence, step_id=plan.step_id)

    def _publish(self, sequence: Sequence, step_id: int) -> None:
        """Key what the plan completes, and wake those who waited for it."""
        tokens, end = sequence.tokens, sequence.num_scheduled
        keys = self.cache.publish(sequence.table, tokens, end, step_id=step_id)
        is_last = end == sequence.prefill_end
        if is_last:
            self.cache.publish_tail(sequence.table, tokens, step_id=step_id)
        copies_last = self.cache.enable_partial_reuse
        self._queue.keep(sequence, len(keys), is_last=is_last, copies_last=copies_last)

    def _plan_admissions(self, plan: StepPlan, entries: list[tuple[int, Sequence, int]], budget: int) -> int:
        """Admit in order until tokens, rows or pages run out; returns the tokens left."""
        num_prompts = self._num_admissible()
        while budget > 0 and self._rows.has_free and not self._queue.is_closed:
            sequence = self._queue.head()
            if sequence is None or sequence.last_step > self._last_committed:
                break
            if sequence.num_rows > self._rows.num_free or not self._admission.may_look(sequence):
                break
            hit = self._lookup(sequence, plan.step_id)
            if self._queue.park_head(hit.wanted):
                self.stats.num_parked += 1
                continue
            if not self._enable_chunked_prefill and not self._fits_whole(sequence, hit, budget):
                break
            chunk = self._admit(plan, sequence, hit, self._chunking.share(budget, num_prompts))
            num_prompts -= 1
            if not chunk:
                break
            self._plan_chunk(plan, entries, sequence, chunk)
            budget -= chunk
        return budget

    def _lookup(self, sequence: Sequence, step_id: int) -> Hit:
        """Find what the cache holds; a request for logits of its prompt must run all of it."""
        if sequence.wants_prompt_logits:
            return NO_HIT
        return self.cache.lookup(sequence.table, sequence.tokens, step_id=step_id)

    def _fits_whole(self, sequence: Sequence, hit: Hit, budget: int) -> bool:
        """Say whether a prompt runs in one step; what a preempted one grew beyond any step runs in chunks."""
        return min(len(sequence.tokens) - self._cached(hit), self._max_num_tokens) <= budget

    def _cached(self, hit: Hit) -> int:
        return len(hit.nodes) * self.cache.block_tokens + hit.partial_len

    def _admit(self, plan: StepPlan, sequence: Sequence, hit: Hit, budget: int) -> int:
        """Give a waiting sequence a row and pages; returns its first chunk's length, 0 if it must wait."""
        chosen = self._admission.choose(sequence, hit)
        if chosen is None:
            return 0
        hit = chosen
        cached = self._cached(hit)
        chunk = min(budget, len(sequence.tokens) - cached)
        copies = self.cache.admit(sequence.table, hit, cached + chunk, step_id=plan.step_id)
        if copies is None:
            self._admission.refuse(sequence)
            return 0
        self._queue.take()
        self._start(plan, sequence, cached)
        plan.copies += copies
        self.stats.num_cached_tokens += cached
        self.stats.num_copied_blocks += hit.partial is not None
        self._queue.promise(sequence, hit.wanted)
        return chunk

    def _start(self, plan: StepPlan, sequence: Sequence, cached: int) -> None:
        self._rows.start(sequence)
        if sequence.group is not None:
            self._beams.start(sequence.group)
        sequence.admission = self.stats.num_admissions
        sequence.state = State.RUNNING
        sequence.num_scheduled = sequence.num_computed = cached
        sequence.prefill_end = len(sequence.tokens)
        if sequence.num_cached_tokens < 0:
            sequence.num_cached_tokens = cached
        plan.added.append(sequence.to_init())
        self.stats.num_admissions += 1
        self.stats.num_queried_tokens += len(sequence.tokens)
        self._notes.admitted(sequence, step_id=plan.step_id, num_cached=cached)

    def _leave(self, sequence: Sequence) -> None:
        """Take a running sequence, a search as a whole, off its rows; the next plan tells the runner."""
        for member in self._beams.leaving(sequence):
            self._rows.leave(member)
            self.cache.release(member.table, after_step=member.last_step)
            self._queue.break_promises(member)

    def _preempt(self, sequence: Sequence, *, reason: str = SHORT_OF_PAGES) -> None:
        """Send a running sequence back to the queue; its tokens in flight still commit.

        A search starts anew instead: what it would resume are many sequences, and it ends the same.
        """
        self._leave(sequence)
        if sequence.group is not None:
            sequence = self._beams.restart(sequence.group)
        sequence.state = State.WAITING
        sequence.num_scheduled = sequence.num_computed = 0
        sequence.num_preemptions += 1
        self.stats.num_preemptions += 1
        self._notes.preempted(sequence, reason)
        self._queue.push(sequence)

    def _finish(self, sequence: Sequence, reason: str, *, keep: bool = True) -> None:
        """End a sequence, a search as a whole, for good; `keep` what it computed findable."""
        members = [sequence]
        if sequence.group is not None:
            sequence, members = sequence.group.root, sequence.group.placed
        if sequence.state is State.RUNNING:
            for member in members if keep else ():
                self._publish_rest(member)
            self._leave(sequence)
        else:
            self._queue.forget()
        for ended in (sequence, *members):
            ended.state = State.FINISHED
        self._notes.finished(sequence, reason)
        del self._sequences[(sequence.request.request_id, sequence.request.sample_idx)]

    def _end(self, sequence: Sequence, reason: FinishReason, *, keep: bool = True) -> list[TokenEvent]:
        """End a sequence before its time; returns what is left to say of it."""
        if sequence.group is not None:
            events = outcomes(sequence.group, reason)
            for event in events:
                describe_way(event, sequence.group.root)
        else:
            events = [_event(sequence, finish_reason=reason)]
        self._finish(sequence, reason, keep=keep)
        return events

    def _publish_rest(self, sequence: Sequence) -> None:
        known = min(len(sequence.tokens), sequence.num_scheduled)
        tokens, step_id = sequence.tokens, sequence.last_step
        self.cache.publish(sequence.table, tokens, known, step_id=step_id)
        if sequence.num_scheduled >= sequence.prefill_end:
            self.cache.publish_tail(sequence.table, tokens[:known], step_id=step_id)

    def commit(self, result: StepResult) -> list[TokenEvent]:
        """Take in the result of the oldest outstanding step; returns what its rows have to say."""
        step_id, entries = self._outstanding.popleft()
        assert step_id == result.step_id, "results come back in the order of their plans"
        self._last_committed = step_id
        self._notes.begin_commit()
        self.cache.pool.retire(step_id)
        self.stats.executed_tokens += result.executed_tokens
        events: list[TokenEvent] = []
        if result.row_errors or result.kv_failed:
            self._fail_rows(result, entries, events)
        tokens, logprobs = result.tokens, result.logprobs
        finished = State.FINISHED
        searches: dict[BeamGroup, None] = {}
        for row, sequence, end in entries:
            if sequence.state is finished:
                continue
            if sequence.row == row:
                sequence.num_computed = end
            ids = tokens.get(row)
            if ids is None or step_id <= sequence.discard_through:
                # What a rewound step computed from bad pages is computed again.
                if row in result.extras and step_id > sequence.discard_through:
                    self._commit_extras(sequence, result.extras[row], end, events)
                continue
            if sequence.group is not None:
                self._commit_extras(sequence, result.extras.get(row, ()), end, events)
                if step_id > sequence.group.discard_through:
                    searches[sequence.group] = None
                continue
            sequence.num_in_flight -= 1
            if not ids:
                continue
            token = ids[0]
            sequence.tokens.append(token)
            event = TokenEvent(sequence.request.request_id, sequence.request.sample_idx, ids)
            if logprobs and row in logprobs:
                event.logprobs = logprobs[row]
            if result.extras and row in result.extras:
                event.extras = result.extras[row]
            if token in sequence.stop_ids:
                self._stop(sequence, event, "stop", token)
            elif len(sequence.tokens) >= sequence.max_len:
                self._stop(sequence, event, "length", None)
            events.append(event)
        for group in searches:
            last = self._beams.commit(group, result)
            for event in last:
                describe_way(event, group.root)
            if last:
                self._finish(group.root, last[0].finish_reason or "")
            events += last
        self._notes.committed(step_id, events)
        return events

    def _commit_extras(self, sequence: Sequence, extras: Any, end: int, events: list[TokenEvent]) -> None:
        """Pass on what a step without a token brought; a request that samples none ends with its prompt.

        Logits of generated tokens wait until a search knows whose they are.
        """
        extras = [extra for extra in extras if extra[0] != "generation_logits"]
        if not extras:
            return
        event = TokenEvent(sequence.request.request_id, sequence.request.sample_idx, extras=extras)
        if not sequence.request.max_tokens and end == sequence.prefill_end:
            self._stop(sequence, event, "length", None)
        events.append(event)

    def _stop(
        self, sequence: Sequence, event: TokenEvent, reason: FinishReason, stop_token: int | None
    ) -> None:
        event.finish_reason = reason
        event.stop_reason = stop_token
        describe_way(event, sequence)
        self._finish(sequence, reason)

    def _fail_rows(
        self, result: StepResult, entries: list[tuple[int, Sequence, int]], events: list[TokenEvent]
    ) -> None:
        """Fail rows with an error, and rewind whoever read pages that they or a failed load wrote.

        The earliest admission fails first: a later row that fails only because it reads the first one's pages
        is rewound, recomputes them itself and fails then only by its own doing. A row that ended meanwhile
        has nothing to say, but what it wrote is as bad.
        """
        self._rewind_readers(self.cache.condemn_pages(result.kv_failed), entries)
        failing = [(seq, row) for row, seq, _ in entries if row in result.row_errors]
        for sequence, row in sorted(failing, key=lambda pair: pair[0].admission):
            message, code = result.row_errors[row], result.error_codes.get(row, "numerical_error")
            if sequence.discard_through >= result.step_id:
                continue
            # Only where the numbers are bad are the pages; a processor that raises harms no reader of them.
            is_sound = code != "numerical_error"
            bad: set[int] = set() if is_sound else self.cache.condemn(sequence.table)
            if sequence.state is not State.FINISHED:
                last = self._end(sequence, "error", keep=is_sound)
                for event in last:
                    event.error = (message, code)
                events += last
            self._rewind_readers(bad, entries)

    def _rewind_readers(self, bad: set[int], entries: list[tuple[int, Sequence, int]]) -> None:
        """Preempt every sequence in flight that read a bad page, and drop what it has in flight.

        What a reader wrote is bad in turn, so this repeats until nobody is found.
        """
        steps = [entries, *(later for _, later in self._outstanding)]
        suspects = dict.fromkeys(self.running())
        suspects.update(dict.fromkeys(sequence for step in steps for _, sequence, _ in step))
        while readers := [sequence for sequence in suspects if sequence.table.has_read(bad)]:
            for sequence in readers:
                del suspects[sequence]
                bad |= self.cache.condemn(sequence.table, bad)
                if sequence.state is State.FINISHED or sequence.discard_through == self._next_step_id - 1:
                    continue
                sequence.discard_through = self._next_step_id - 1
                sequence.num_in_flight = 0
                if sequence.state is State.RUNNING:
                    self._preempt(sequence, reason=READ_BAD_PAGES)
                self.stats.num_rewound += 1


def _event(sequence: Sequence, *, finish_reason: FinishReason) -> TokenEvent:
    request = sequence.request
    event = TokenEvent(request.request_id, request.sample_idx, finish_reason=finish_reason)
    describe_way(event, sequence)
    return event
