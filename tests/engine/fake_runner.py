"""What would a device do with these plans? A runner over integers that knows who wrote every slot.

Invariant: `FakeRunner` shares no code with the scheduler or the cache. Every slot of a page stores (position,
token, hash of all tokens before it); before a span reads, every position its attention would see must hold
exactly that for its own row. So a wrong or early reuse, a page freed too soon, a write to a shared page, and
a page reused under an undrained copy all end in an AssertionError that names them. The sampled token is a
function of the history alone, so outputs must not depend on the schedule.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Iterable, Sequence

from slipstream.cache.groups import resolve
from slipstream.cache.kv_cache import KvCache
from slipstream.core.cache_group import CacheGroup
from slipstream.core.limits import Limits
from slipstream.core.outputs import TokenEvent
from slipstream.core.plan import (
    Candidates,
    RequestInit,
    Span,
    StepPlan,
    StepResult,
    decode_plan,
    decode_result,
    encode,
)
from slipstream.core.request import Request, RequestOptions
from slipstream.core.sampling_params import SamplingParams
from slipstream.engine.beam_search import BeamSearch
from slipstream.engine.scheduler import Scheduler

Key = tuple[str, int]  # request id, sample index
Slot = tuple[int, int, int]  # position, token, hash of the tokens before it

UNWRITTEN: Slot = (-1, -1, -1)
ZERO: Slot = (-2, -2, -2)
NAN: Slot = (-3, -3, -3)

EOS = 1
FIRST_TOKEN = 2
VOCAB_SIZE = 1000
LIMITS = Limits(vocab_size=VOCAB_SIZE, max_seq_len=100_000, eos_token_ids=(EOS,))


def extend_history(history: int, token: int) -> int:
    mixed = (history ^ (token + 0x9E3779B97F4A7C15)) * 0xBF58476D1CE4E5B9 & (1 << 64) - 1
    return mixed ^ mixed >> 31


def sampled_token(history: int, seed: int, sample_idx: int) -> int:
    """Never EOS."""
    noise = extend_history(extend_history(history, seed), sample_idx)
    return FIRST_TOKEN + noise % (VOCAB_SIZE - FIRST_TOKEN)


def lone_output(request: Request, *, end: int | None = None) -> list[int]:
    """Return what the request generates with the device to itself; EOS comes at output position `end`."""
    history = 0
    for token in request.prompt_token_ids:
        history = extend_history(history, token)
    output: list[int] = []
    while len(output) < request.max_tokens and EOS not in output[-1:]:
        token = EOS if len(output) == end else sampled_token(history, request.seed, request.sample_idx)
        output.append(token)
        history = extend_history(history, token)
    return output


def candidates_after(history: int, count: int) -> Candidates:
    """Return distinct tokens, EOS among them one time in four, with falling log-probabilities."""
    tokens: list[int] = [EOS] if extend_history(history, 99) % 4 == 0 else []
    logprobs: list[float] = []
    mixed = history
    while len(tokens) < count:
        mixed = extend_history(mixed, 7)
        # A vocabulary this small makes hypotheses meet and part again.
        token = FIRST_TOKEN + mixed % (3 * count)
        if token not in tokens:
            tokens.append(token)
    for _ in tokens:
        mixed = extend_history(mixed, 5)
        logprobs.append((logprobs[-1] if logprobs else 0.0) - (1 + mixed % 997) / 500)
    place = mixed % count
    tokens[0], tokens[place] = tokens[place], tokens[0]
    return Candidates(tokens, logprobs, list(range(1, count + 1)))


def lone_search(request: Request) -> list[list[int]]:
    """Return what a beam search yields with the device to itself, without rows and pages."""
    assert request.beams is not None
    search = BeamSearch(request.beams, max_tokens=request.max_tokens, stop_ids=request.stop_token_ids)
    history = 0
    for token in request.prompt_token_ids:
        history = extend_history(history, token)
    histories = [history]
    while not search.is_done:
        found = [candidates_after(one, request.sampling.num_candidates) for one in histories]
        parents = search.advance(found, [None] * len(found))
        pairs = zip(parents, search.live, strict=True)
        histories = [extend_history(histories[parent], one.token) for parent, one in pairs]
    return [[step.token for step in one.path()] for one in search.best(request.num_returned)]


class Row:
    """One persistent row: token buffer, block tables, device length."""

    def __init__(self, init: RequestInit) -> None:
        self.init = init
        self.key: Key = (init.request_id, init.sample_idx)
        self.history = 0
        self.slots: list[Slot] = []
        self.num_computed = init.num_computed
        self.tables = [list(pages) for pages in init.blocks]
        assert init.num_prompt <= len(init.tokens) and init.num_computed < len(init.tokens)
        for token in init.tokens:
            self.push(token)

    def push(self, token: int) -> None:
        self.slots.append((len(self.slots), token, self.history))
        self.history = extend_history(self.history, token)

    @property
    def num_output(self) -> int:
        return len(self.slots) - self.init.num_prompt


@dataclasses.dataclass
class Step:
    """A launched step: the pages it names, and what `collect` will say."""

    plan: StepPlan
    named: set[int]
    tokens: dict[int, list[int]] = dataclasses.field(default_factory=dict[int, list[int]])
    candidates: dict[int, Candidates] = dataclasses.field(default_factory=dict[int, Candidates])
    errors: dict[int, str] = dataclasses.field(default_factory=dict[int, str])
    kv_failed: list[int] = dataclasses.field(default_factory=list[int])
    is_sampled: bool = False


class FakeRunner:
    """`launch`, `sample`, `collect` of a runner, checking instead of computing.

    `ends[key]` is the output position at which EOS comes, `nan_at[key]` the position whose K and V come out
    as NaN; `fail_loads[step_id]` pages that the step reports as `kv_failed`.
    """

    needs_host_tokens = False
    wants_capture = False

    def __init__(self, groups: Sequence[CacheGroup], num_pages: int) -> None:
        self.block_tokens = groups[0].block_tokens
        self.windows = [group.window for group in groups]
        self.pages = [[UNWRITTEN] * self.block_tokens for _ in range(num_pages)]
        self.pages[0] = [ZERO] * self.block_tokens
        self.rows: dict[int, Row] = {}
        self.outstanding: deque[Step] = deque()
        self.plans: list[StepPlan] = []
        self.ends: dict[Key, int] = {}
        self.nan_at: dict[Key, int] = {}
        self.fail_loads: dict[int, list[int]] = {}
        self._owners: dict[int, Row] = {}
        self._held: set[int] = set()

    def launch(self, plan: StepPlan) -> Step:
        plan = decode_plan(encode(plan))
        assert plan.step_id == len(self.plans), "plans come in the order of their ids"
        assert all(step.is_sampled for step in self.outstanding), "a step starts after the last one sampled"
        assert plan.spans, "an empty step"
        assert not (plan.loads or plan.stores or plan.logits), "nothing here asks for these"
        self.plans.append(plan)
        new = self._apply_rows(plan)
        for row, start, ids in plan.tokens:
            self._overwrite(self.rows[row], start, ids)
        self._copy(plan.copies, new)
        step = Step(plan, {page for copy in plan.copies for page in copy} - {0})
        self._forward(step)
        self.outstanding.append(step)
        return step

    def sample(self, step: Step, masks: object = None) -> None:
        """Append the sampled tokens to the rows' buffers on the device; the host learns them in `collect`."""
        assert step is self.outstanding[-1] and not step.is_sampled
        step.is_sampled = True
        spans = {span.row for span in step.plan.spans}
        assert len(set(step.plan.sample)) == len(step.plan.sample)
        for number in step.plan.sample:
            row = self.rows[number]
            assert number in spans and row.num_computed == len(row.slots), "sampled before its last token ran"
            is_end = self.ends.get(row.key) == row.num_output
            token = EOS if is_end else sampled_token(row.history, row.init.seed, row.init.sample_idx)
            if row.init.sampling.num_candidates:
                step.candidates[number] = candidates_after(row.history, row.init.sampling.num_candidates)
            step.tokens[number] = [] if number in step.errors else [token]
            row.push(token)

    def _overwrite(self, row: Row, start: int, ids: Sequence[int]) -> None:
        """Replace what was sampled last by what a search picked; of other rows, known tokens are resent."""
        if row.init.sampling.num_candidates:
            assert len(ids) == 1 and start == len(row.slots) - 1, "one token is picked, for the last place"
            row.history = row.slots.pop()[2]
            row.push(ids[0])
        assert [slot[1] for slot in row.slots[start:]] == ids, "only known tokens are resent"

    def collect(self, step: Step) -> StepResult:
        """Return the result of the oldest outstanding step; from here on its pages and copies are free."""
        assert step is self.outstanding[0] and step.is_sampled
        step_id = step.plan.step_id
        assert step_id not in self._held or len(self.plans) > step_id + 1, "collect would block for ever"
        self.outstanding.popleft()
        result = StepResult(
            step_id,
            tokens=step.tokens,
            executed_tokens=step.plan.num_tokens,
            candidates=step.candidates,
            row_errors=step.errors,
            kv_failed=self.fail_loads.get(step_id, []),
        )
        return decode_result(encode(result))

    def hold(self, step_id: int) -> None:
        """Let `collect` of this step succeed only once the next one was launched."""
        self._held.add(step_id)

    def _apply_rows(self, plan: StepPlan) -> set[int]:
        """Apply removed, added and new_blocks; returns the pages that this plan hands out for writing."""
        for number in plan.removed:
            del self.rows[number]
        in_use = {page for row in self.rows.values() for page in self._visible(row, row.num_computed)}
        for step in self.outstanding:
            in_use |= step.named
        new: list[int] = []
        for init in plan.added:
            assert init.row not in self.rows, f"row {init.row} is taken"
            row = self.rows[init.row] = Row(init)
            for pages in row.tables:
                new += self._hand_out(row, pages[init.num_computed // self.block_tokens :])
        for group, grown in plan.new_blocks.items():
            for number, pages in grown:
                new += self._hand_out(self.rows[number], pages)
                self.rows[number].tables[group] += pages
        assert len(set(new)) == len(new), "a page is handed out twice"
        assert in_use.isdisjoint(new), f"pages {in_use.intersection(new)} are handed out while in use"
        return set(new)

    def _hand_out(self, row: Row, pages: Sequence[int]) -> Sequence[int]:
        for page in pages:
            assert 0 < page < len(self.pages), f"page {page} cannot be written"
            self._owners[page] = row
        return pages

    def _copy(self, copies: Sequence[tuple[int, int]], new: set[int]) -> None:
        """Copy whole pages. Order must not matter: a device runs all copies of a step at once."""
        targets = [target for _, target in copies]
        assert len(set(targets)) == len(targets), "two copies write one page"
        assert new.issuperset(targets), "a copy writes a page that was not handed out for it"
        assert new.isdisjoint(source for source, _ in copies), "a copy reads what nobody wrote"
        for page in new.difference(targets):
            assert NAN not in self.pages[page], f"page {page} comes back with NaN in it"
            self.pages[page] = [UNWRITTEN] * self.block_tokens
        for source, target in copies:
            self.pages[target] = list(self.pages[source])

    def _first_block(self, group: int, position: int) -> int:
        """Return the first block that a query at `position` or later sees."""
        window = self.windows[group]
        return max(0, position - window + 1) // self.block_tokens if window else 0

    def _visible(self, row: Row, position: int) -> set[int]:
        seen = (pages[self._first_block(group, position) :] for group, pages in enumerate(row.tables))
        return {page for pages in seen for page in pages}

    def _forward(self, step: Step) -> None:
        """Write the K and V of all spans, then let all of them read, as every layer does."""
        spans = step.plan.spans
        assert len({span.row for span in spans}) == len(spans)
        for span in spans:
            row = self.rows[span.row]
            end = span.start + span.len
            assert span.start == row.num_computed, f"row {span.row} stands at {row.num_computed}: {span}"
            assert span.start < end <= len(row.slots), f"row {span.row} has no token for {span}"
            nan_at = self.nan_at.get(row.key, end)
            clean = row.slots[span.start : max(span.start, min(nan_at, end))]
            self._write(row, span.start, [*clean, *[NAN] * (span.len - len(clean))])
            row.num_computed = end
            step.named |= self._visible(row, span.start)
        self._spread_nan(step)

    def _write(self, row: Row, start: int, slots: Sequence[Slot]) -> None:
        size = self.block_tokens
        for pages in row.tables:
            for position, slot in enumerate(slots, start):
                page = pages[position // size]
                assert page != 0, f"{row.key} writes the null page at position {position}"
                assert self._owners[page] is row, f"{row.key} writes page {page}, which is not its own"
                self.pages[page][position % size] = slot

    def _spread_nan(self, step: Step) -> None:
        """Check what every span reads; one that reads NaN writes NaN, until no more do."""
        clean = list(step.plan.spans)
        while True:
            found = [(span, self._first_nan(span)) for span in clean]
            spread = [(span, position) for span, position in found if position is not None]
            for span, position in spread:
                start = max(span.start, position)
                self._write(self.rows[span.row], start, [NAN] * (span.start + span.len - start))
                step.errors[span.row] = "NaN in the logits"
            if not spread:
                return
            clean = [span for span, position in found if position is None]

    def _first_nan(self, span: Span) -> int | None:
        """Assert that the span sees its own row's history; returns the first NaN position among it."""
        row, size, end = self.rows[span.row], self.block_tokens, span.start + span.len
        first_nan: int | None = None
        for group, window in enumerate(self.windows):
            start = max(0, span.start - window + 1) if window else 0
            for block in range(start // size, -(-end // size)):
                low, high = max(start, block * size), min(end, (block + 1) * size)
                page = row.tables[group][block]
                held = self.pages[page][low - block * size : high - block * size]
                if held == row.slots[low:high]:
                    continue
                for position, slot in enumerate(held, low):
                    is_nan = slot == NAN
                    assert is_nan or slot == row.slots[position], (
                        f"{row.key} reads {slot} in page {page} at position {position} of group {group}, "
                        f"which should hold {row.slots[position]}"
                    )
                    if is_nan and (first_nan is None or position < first_nan):
                        first_nan = position
        return first_nan


class Replica:
    """A scheduler, a cache and a fake runner in one loop with `depth` outstanding plans, checked throughout.

    `outputs` and `reasons` collect what the events said, per (request id, sample index).
    """

    def __init__(
        self,
        declared: Sequence[CacheGroup],
        *,
        num_pages: int,
        block_tokens: int = 8,
        depth: int = 1,
        max_batch_size: int = 8,
        max_num_tokens: int = 64,
        enable_block_reuse: bool = True,
        enable_partial_reuse: bool = True,
        enable_chunked_prefill: bool = True,
        policy: str = "MAX_UTILIZATION",
        chunking_policy: str = "FIRST_COME_FIRST_SERVED",
        event_buffer_max_size: int = 0,
    ) -> None:
        groups = resolve(declared, block_tokens=block_tokens, element_bytes=4)
        self.cache = KvCache(
            groups,
            num_pages,
            enable_block_reuse=enable_block_reuse,
            enable_partial_reuse=enable_partial_reuse,
            event_buffer_max_size=event_buffer_max_size,
        )
        self.scheduler = Scheduler(
            self.cache,
            max_batch_size=max_batch_size,
            max_num_tokens=max_num_tokens,
            enable_chunked_prefill=enable_chunked_prefill,
            policy=policy,
            chunking_policy=chunking_policy,
        )
        self.runner = FakeRunner(groups, num_pages)
        self.depth = depth
        self.max_batch_size = max_batch_size
        self.max_num_tokens = max_num_tokens
        self.requests: dict[Key, Request] = {}
        self.outputs: dict[Key, list[int]] = {}
        self.reasons: dict[Key, str] = {}
        self.events: list[TokenEvent] = []
        self._steps: deque[Step] = deque()

    def submit(
        self,
        name: str,
        prompt: Sequence[int],
        max_tokens: int,
        *,
        n: int = 1,
        salt: str | None = None,
        end: int | None = None,
        priority: int = 0,
        options: RequestOptions | None = None,
        beam_width: int | None = None,
    ) -> Request:
        """Submit a request with seed 7, arriving at second 0; EOS comes at output position `end`.

        With `beam_width` it is a beam search that returns n outputs and ends as its candidates say.
        """
        params = SamplingParams(
            max_tokens=max_tokens,
            n=n,
            seed=7,
            cache_salt=salt,
            priority=priority,
            use_beam_search=beam_width is not None,
            beam_width=beam_width,
        )
        request = Request.create(
            list(prompt), params, LIMITS, request_id=name, arrival_s=0.0, options=options
        )
        self.scheduler.submit(request)
        samples = request.samples() if request.beams is None else [request] * n
        for index, sample in enumerate(samples):
            key = (name, index)
            self.requests[key] = sample
            self.outputs[key] = []
            if end is not None:
                self.runner.ends[key] = end
        return request

    def abort(self, name: str, index: int | None = None) -> None:
        self._take(self.scheduler.abort(name, index))

    def expire(self, now_s: float) -> None:
        """Let the clock say `now_s`."""
        self._take(self.scheduler.expire(now_s))

    def launch(self) -> StepPlan | None:
        """Plan and launch one step, if one can run now."""
        scheduler = self.scheduler
        plan = scheduler.plan()
        if plan is None:
            assert self._steps or not scheduler.has_work, "work, nothing outstanding, and no plan"
            return None
        assert plan.num_tokens <= self.max_num_tokens
        step = self.runner.launch(plan)
        assert len(self.runner.rows) <= self.max_batch_size
        self.runner.sample(step)
        self._steps.append(step)
        self.cache.pool.check()
        return plan

    def commit(self) -> list[TokenEvent]:
        """Collect and commit the oldest outstanding step."""
        events = self.scheduler.commit(self.runner.collect(self._steps.popleft()))
        self.cache.pool.check()
        self._take(events)
        return events

    def step(self) -> StepPlan | None:
        """Launch one step; commit the oldest once `depth` are outstanding, or where nothing was launched."""
        plan = self.launch()
        if self._steps and (plan is None or len(self._steps) >= self.depth):
            self.commit()
        return plan

    def run(self, *, max_steps: int = 10_000, until: Callable[[], bool] | None = None) -> int:
        """Step until nothing is left to do (or `until` holds); returns the number of steps."""
        for count in range(max_steps):
            if until() if until else not self.scheduler.has_work:
                return count
            self.step()
        raise AssertionError(f"not done after {max_steps} steps")

    def _take(self, events: Iterable[TokenEvent]) -> None:
        for event in events:
            key = (event.request_id, event.index)
            assert key not in self.reasons, f"{key} speaks after its end"
            self.outputs[key] += event.new_token_ids
            self.events.append(event)
            if event.finish_reason is not None:
                self.reasons[key] = event.finish_reason

    def expected(self, key: Key) -> list[int]:
        request = self.requests[key]
        if request.beams is not None:
            return lone_search(request)[key[1]]
        return lone_output(request, end=self.runner.ends.get(key))

    def check_outputs(self) -> None:
        """Assert that every sample ended once, and said what it says alone (a start of it where cut off)."""
        assert self.reasons.keys() == self.requests.keys()
        for key, output in self.outputs.items():
            is_cut_off = self.reasons[key] in ("cancelled", "timeout", "error")
            if is_cut_off and self.requests[key].beams is not None:
                # The best so far need not be the start of the best at the end.
                continue
            expected = self.expected(key)
            if is_cut_off:
                expected = expected[: len(output)]
            assert output == expected, f"{key} ({self.reasons[key]}): {output} instead of {expected}"

    def check_idle(self) -> None:
        """Assert that nothing is held once everything ended and all steps committed."""
        scheduler, pool = self.scheduler, self.cache.pool
        assert not scheduler.has_work and not self._steps
        assert scheduler.plan() is None
        assert (scheduler.num_waiting, scheduler.num_running, scheduler.num_outstanding) == (0, 0, 0)
        assert pool.num_free == pool.num_usable and pool.num_retiring == 0

    def check_reusable(self) -> None:
        """Assert that no promise and no row was lost: every prompt runs again, and every row at once."""
        salts = {tuple(sample.prompt_token_ids): sample.cache_salt for sample in self.requests.values()}
        for i, (prompt, salt) in enumerate(salts.items()):
            self.submit(f"again{i}", prompt, 1, salt=salt)
        self.run()
        # Admission spares a block for every eight rows.
        num_blocks = self.cache.pool.num_usable // len(self.cache.groups)
        num_rows = min(self.max_batch_size, self.max_num_tokens, num_blocks * 8 // 9)
        for i in range(num_rows):
            self.submit(f"row{i}", [10 + i], 2)
        plan = self.launch()
        assert plan is not None and len(plan.added) == num_rows
        self.run()
        self.check_outputs()
        self.check_idle()


def full(layers: int = 2) -> list[CacheGroup]:
    return [CacheGroup(layers=tuple(range(layers)), kind="full", heads=1, head_dim=4)]


def hybrid(window: int) -> list[CacheGroup]:
    """Four local layers to two global ones: resolved into two window groups and one full group."""
    local = CacheGroup(layers=(0, 1, 3, 4), kind="window", heads=1, head_dim=4, window=window)
    return [local, CacheGroup(layers=(2, 5), kind="full", heads=1, head_dim=4)]
