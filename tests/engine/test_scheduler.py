"""Does the scheduler keep each promise that its docstring makes? One named scenario per promise."""

from __future__ import annotations

import random
from hashlib import sha256
from types import SimpleNamespace

import pytest
from fake_runner import EOS, Replica, full, hybrid
from test_scheduler_properties import SETUPS, Traffic

from slipstream.cache import keys
from slipstream.cache.kv_cache import KvCache
from slipstream.core.errors import RequestError
from slipstream.core.plan import StepPlan, decode_plan, encode
from slipstream.engine.scheduler import Scheduler
from slipstream.engine.sequence import Sequence

PREFIX = list(range(100, 164))  # eight blocks of 8


def replica_of(*, num_pages: int = 400, **options: int) -> Replica:
    return Replica(full(), num_pages=num_pages, block_tokens=8, **options)


def launched(replica: Replica) -> StepPlan:
    """Step, and return the plan that this launched."""
    plan = replica.step()
    assert plan is not None
    return plan


def sequence_of(replica: Replica, name: str) -> Sequence:
    return replica.scheduler._sequences[name, 0]


def finish(replica: Replica) -> None:
    replica.run()
    replica.check_outputs()
    replica.check_idle()


def test_a_short_request_leaves_and_a_new_one_takes_its_row_at_once() -> None:
    replica = replica_of(max_batch_size=2)
    replica.submit("long", [5] * 9, 30)
    replica.submit("short", [6] * 9, 3)
    replica.submit("next", [7] * 9, 3)
    row = {init.request_id: init.row for init in launched(replica).added}["short"]
    replica.run(until=lambda: ("short", 0) in replica.reasons)
    plan = launched(replica)
    assert plan.removed == [row]
    assert [(init.request_id, init.row) for init in plan.added] == [("next", row)]
    assert ("long", 0) not in replica.reasons
    finish(replica)


def test_a_long_prompt_runs_in_chunks_beside_decoding_rows() -> None:
    """The decoding row gets its token in every step; the prompt fills what is left of the step."""
    replica = replica_of(max_num_tokens=16)
    replica.submit("decoding", [5] * 9, 30)
    row = launched(replica).added[0].row
    replica.submit("long", [6] * 100, 4)
    plans = [launched(replica) for _ in range(7)]
    spans = [[(span.row == row, span.len) for span in plan.spans] for plan in plans]
    assert spans == [[(True, 1), (False, 15)]] * 6 + [[(True, 1), (False, 10)]]
    assert [len(plan.sample) for plan in plans] == [1] * 6 + [2]  # sampled only after the last chunk
    finish(replica)


def test_whole_prompts_wait_for_a_step_that_holds_them() -> None:
    replica = Replica(full(), num_pages=100, max_num_tokens=16, enable_chunked_prefill=False)
    replica.submit("first", [5] * 10, 4)
    replica.submit("second", [6] * 10, 4)
    assert [span.len for span in launched(replica).spans] == [10]
    assert [span.len for span in launched(replica).spans] == [1, 10]
    with pytest.raises(RequestError, match=r"17 tokens and a step runs at most 16"):
        replica.submit("third", [7] * 17, 4)
    finish(replica)


def test_overlapped_plans_are_launched_before_their_predecessor_is_collected() -> None:
    def run(depth: int) -> Replica:
        replica = replica_of(depth=depth)
        replica.submit("a", [5] * 9, 10)
        for step_id in range(9):  # the tenth step is the last: nothing follows it
            replica.runner.hold(step_id)
        finish(replica)
        return replica

    assert run(2).scheduler.stats.max_outstanding == 2
    with pytest.raises(AssertionError, match="block for ever"):
        run(1)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_tokens_behind_a_late_stop_are_dropped(depth: int) -> None:
    replica = replica_of(depth=depth)
    replica.submit("a", [5] * 9, 20, end=3)
    finish(replica)
    assert replica.reasons == {("a", 0): "stop"} and replica.events[-1].stop_reason == EOS
    assert len(replica.outputs["a", 0]) == 4 and replica.outputs["a", 0][-1] == EOS
    # Later steps ran the row before the stop was known: their tokens never reached an event.
    assert len(replica.runner.plans) == 4 + depth - 1


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_many_long_requests_in_a_pool_of_little_more_than_one(
    depth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All finish, in order of arrival; the victim is the latest arrival, and nobody comes in its step."""
    replica = replica_of(num_pages=1 + 10, depth=depth, max_num_tokens=64)  # a request needs 8 pages
    preempt = Scheduler._preempt
    victims: list[int] = []

    def preempt_latest(scheduler: Scheduler, sequence: Sequence) -> None:
        orders = [running.order for running in scheduler.running()]
        assert sequence.order == max(orders) and len(orders) > 1
        victims.append(scheduler._next_step_id)
        preempt(scheduler, sequence)

    monkeypatch.setattr(Scheduler, "_preempt", preempt_latest)
    for i in range(50):
        replica.submit(f"r{i}", [10 + i] * 24, 40)
    # The oldest advances in every step but those that wait for pages to come back, at most `depth` for each
    # of its five growths; alone it takes 40 steps.
    num_steps = replica.run(max_steps=50 * (40 + 5 * depth + depth))
    assert num_steps > 0 and len(victims) == replica.scheduler.stats.num_preemptions >= 50
    assert list(replica.reasons) == [(f"r{i}", 0) for i in range(50)]
    if depth > 1:
        # With nothing outstanding the victim's pages come back at once, and the plan starts anew.
        assert not any(replica.runner.plans[step_id].added for step_id in victims)
    replica.check_outputs()
    replica.check_idle()


def test_a_request_that_can_never_fit_is_refused_with_both_numbers() -> None:
    replica = replica_of(num_pages=10)
    with pytest.raises(RequestError, match=r"needs 13 cache pages .*the cache has 9;") as refused:
        replica.submit("a", [5] * 60, 40)
    assert refused.value.param == "max_tokens"
    assert not replica.scheduler.has_work
    replica.submit("b", [5] * 60, 12)  # 72 tokens fill the nine pages
    finish(replica)


def test_an_id_in_use_is_refused() -> None:
    replica = replica_of()
    replica.submit("a", [5] * 9, 4)
    with pytest.raises(RequestError, match="'a' is in use"):
        replica.submit("a", [5] * 9, 4)
    finish(replica)


@pytest.mark.parametrize("num_committed", [0, 1, 2])
@pytest.mark.parametrize("state", ["waiting", "parked", "prefill", "decode"])
def test_abort_gives_back_exactly_its_own_pages(state: str, num_committed: int) -> None:
    """Two plans are outstanding at the abort, or one, or none."""
    replica = replica_of(depth=3, max_num_tokens=34, max_batch_size=1 if state == "waiting" else 8)
    replica.submit("other", [5] * 9, 40)
    replica.launch()
    if state == "parked":
        # The owner runs in chunks of less than a step, so that a sibling is looked at beside it.
        replica.submit("owner", [6] * 35, 4)
        replica.submit("victim", [6] * 35, 4)
    else:
        replica.submit("victim", [6] * (60 if state == "prefill" else 20), 30)
    replica.launch()
    if state == "parked":
        replica.launch()
        assert replica.scheduler.stats.num_parked == 1
        replica.commit()
    victim = sequence_of(replica, "victim")
    found = "running" if victim.row >= 0 else "waiting"
    assert found == ("running" if state in ("prefill", "decode") else "waiting")
    for _ in range(num_committed):
        replica.commit()
    replica.abort("victim")
    replica.abort("victim")  # idempotent
    assert replica.reasons == {("victim", 0): "cancelled"}
    while replica.scheduler.num_outstanding:
        replica.commit()
    held = [page for sequence in replica.scheduler.running() for page in sequence.table.pages[0]]
    pool = replica.cache.pool
    assert pool.num_usable - pool.num_free == len(set(held)) == len(held)
    assert pool.num_retiring == 0
    finish(replica)


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("length", [64, 160])
def test_siblings_submitted_together_compute_their_prefix_once(length: int, depth: int) -> None:
    """Eight tails wait for one prefix (of one chunk or three) and start within a step of its end."""
    prefix = list(range(100, 100 + length))
    replica = replica_of(depth=depth, max_num_tokens=72)
    for i in range(8):
        replica.submit(f"r{i}", [*prefix, 10 + i, 11, 12, 13], 1)
    finish(replica)
    plans = replica.runner.plans
    last_chunk = next(plan.step_id for plan in plans if plan.sample)
    added = [(plan.step_id, init) for plan in plans for init in plan.added]
    assert len(added) == 8
    assert max(step_id for step_id, _ in added) <= last_chunk + 1
    assert [init.num_computed for _, init in added] == [0] + [length] * 7
    assert replica.scheduler.stats.executed_tokens == length + 8 * 4


@pytest.mark.parametrize("how", ["abort", "preempt"])
def test_siblings_go_on_where_the_owner_of_their_prefix_stopped(how: str) -> None:
    prefix = list(range(100, 260))
    replica = replica_of(depth=2, max_num_tokens=72)
    for i in range(8):
        replica.submit(f"r{i}", [*prefix, 10 + i, 11], 1)
    replica.launch()
    if how == "abort":
        replica.abort("r0")
    else:
        replica.scheduler._preempt(sequence_of(replica, "r0"))
    finish(replica)
    # The first chunk of 72 tokens ends in a full block, so that nothing is computed twice.
    assert replica.scheduler.stats.executed_tokens == 160 + 2 * (7 if how == "abort" else 8)
    last_chunk = max(plan.step_id for plan in replica.runner.plans if any(s.len > 2 for s in plan.spans))
    added = [plan.step_id for plan in replica.runner.plans for _ in plan.added]
    assert max(added) <= last_chunk + 1


@pytest.mark.parametrize("num_prompt", [7, 20, 24])
def test_samples_of_one_prompt_copy_its_last_block(num_prompt: int) -> None:
    """n = 4: the children share the full blocks, copy the last one and recompute the last token alone."""
    replica = replica_of(depth=2)
    replica.submit("a", list(range(50, 50 + num_prompt)), 12, n=4)
    finish(replica)
    inits = [init for plan in replica.runner.plans for init in plan.added]
    assert [init.num_computed for init in inits] == [0] + [num_prompt - 1] * 3
    assert replica.scheduler.stats.num_copied_blocks == 3
    assert len({tuple(output) for output in replica.outputs.values()}) == 4  # four streams of noise


def test_a_block_that_matches_in_part_is_copied() -> None:
    replica = replica_of()
    replica.submit("a", [*PREFIX[:16], 5, 6, 7, 8], 2)
    finish(replica)
    replica.submit("b", [*PREFIX[:16], 5, 6, 7, 9, 9], 2)
    plan = launched(replica)
    assert plan.added[0].num_computed == 19 and len(plan.copies) == 1
    finish(replica)


def test_generated_tokens_are_found_by_the_next_turn() -> None:
    replica = replica_of(depth=2)
    replica.submit("a", PREFIX[:20], 20)
    finish(replica)
    replica.submit("b", [*PREFIX[:20], *replica.outputs["a", 0], 5, 6], 2)
    finish(replica)
    # The last sampled token was never run: 39 tokens are cached, the prompt has 42.
    assert replica.events[-1].num_cached_tokens == 39


def test_a_salt_separates_and_the_same_salt_shares() -> None:
    replica = replica_of()
    for name, salt in [("a", None), ("b", "tenant-1"), ("c", "tenant-2"), ("d", "tenant-1"), ("e", None)]:
        replica.submit(name, PREFIX, 2, salt=salt)
        finish(replica)
    cached = {event.request_id: event.num_cached_tokens for event in replica.events if event.finish_reason}
    assert cached == {"a": 0, "b": 0, "c": 0, "d": 63, "e": 63}


def test_content_survives_ten_times_the_pool_of_churn() -> None:
    """Needles come back between floods of other prompts; with the cache on or off they say the same."""
    outputs = []
    for reuse in (True, False):
        rng = random.Random(5)
        replica = Replica(full(), num_pages=41, depth=2, enable_block_reuse=reuse)
        needles = [[rng.randrange(2, 900) for _ in range(30)] for _ in range(3)]
        for i in range(150):
            replica.submit(f"flood{i}", [rng.randrange(2, 900) for _ in range(rng.randrange(20, 60))], 4)
            if i % 4 == 0:
                replica.submit(f"needle{i}", [*rng.choice(needles), i], 6)
            if i % 3 == 0:
                replica.run()
        finish(replica)
        outputs.append(replica.outputs)
        hit = {e.request_id: e.num_cached_tokens for e in replica.events if e.request_id.startswith("needle")}
        if reuse:
            assert min(hit.values()) == 0 and max(hit.values()) >= 24  # some were evicted, some were found
            assert replica.scheduler.stats.executed_tokens > 10 * 40 * 8
    assert outputs[0] == outputs[1]


def test_colliding_keys_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A key of one byte: different blocks soon share one, and the fake runner sees the wrong history."""

    class Short:
        def __init__(self, data: bytes) -> None:
            self._whole = sha256(data)
            self.update = self._whole.update

        def digest(self) -> bytes:
            return self._whole.digest()[:1]

    monkeypatch.setattr(keys, "hashlib", SimpleNamespace(sha256=Short))
    replica = replica_of()
    rng = random.Random(3)
    for i in range(60):
        replica.submit(f"r{i}", [rng.randrange(2, 900) for _ in range(40)], 4)
    with pytest.raises(AssertionError, match="which should hold"):
        finish(replica)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_window_holds_a_bounded_number_of_pages(depth: int) -> None:
    window = 16
    replica = Replica(hybrid(window), num_pages=200, depth=depth, max_num_tokens=64)
    replica.submit("a", [5] * 10, 10 * window)
    sequence = sequence_of(replica, "a")
    most = 0
    while replica.scheduler.has_work:
        replica.step()
        live = [sum(page != 0 for page in pages) for pages in sequence.table.pages[:2]]
        most = max(most, *live)
    # 16 positions lie in at most three blocks of 8, and a block is given back when the next one is taken.
    assert most == 3
    replica.check_outputs()
    replica.check_idle()


def test_a_prefix_hit_needs_only_the_window_before_its_end() -> None:
    """The middle of the local groups was evicted: the hit stands, a shorter prompt's does not."""
    replica = Replica(hybrid(16), num_pages=200)
    replica.submit("a", PREFIX, 1)
    finish(replica)
    index = replica.cache._index
    node = index.get(keys.chain_keys(keys.root_key(), keys.content_of(PREFIX[:16]), 8 * keys.TOKEN_BYTES)[1])
    assert node is not None
    index.withdraw(node.pages[:2], replica.cache.pool)  # block 1, both local groups
    replica.submit("b", [*PREFIX, 5], 2)
    replica.submit("c", [*PREFIX[:24], 6], 2)
    inits = launched(replica).added
    assert [init.num_computed for init in inits] == [64, 8]
    assert inits[0].blocks[0][:6] == [0] * 6 and 0 not in inits[0].blocks[2]
    finish(replica)


def test_a_plan_does_not_grow_with_the_context() -> None:
    replica = replica_of(num_pages=200, depth=2)
    replica.submit("a", [5] * 300, 1100)
    finish(replica)
    # Step ids and positions from 256 to 65,535 take three bytes each.
    steady = [plan for plan in replica.runner.plans if plan.step_id >= 256 and not plan.new_blocks]
    assert len(steady) > 700
    assert len({len(encode(plan)) for plan in steady}) == 1
    growing = [len(encode(plan)) for plan in replica.runner.plans[256:] if plan.new_blocks]
    assert max(growing) < len(encode(steady[0])) + 32


def test_recorded_plans_survive_the_wire() -> None:
    traffic = Traffic(SETUPS["hybrid-overlap"], 1)
    plan_once = Scheduler.plan
    seen: list[StepPlan] = []

    def plan(scheduler: Scheduler) -> StepPlan | None:
        made = plan_once(scheduler)
        if made is not None:
            seen.append(decode_plan(encode(made)))
            assert seen[-1] == made
        return made

    traffic.replica.scheduler.plan = plan.__get__(traffic.replica.scheduler)  # type: ignore[method-assign]
    traffic.run(abort_rate=0.02)
    assert seen == traffic.replica.runner.plans and any(p.copies and p.new_blocks for p in seen)


@pytest.mark.parametrize("is_shared", [False, True])
def test_a_plan_looks_at_a_bounded_part_of_the_queue(
    is_shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two thousand wait, alike or not: a plan looks few prefixes up, and wakes few who parked."""
    lookup = KvCache.lookup
    calls: list[int] = []

    def counted(cache: KvCache, table: object, tokens: object, *, step_id: int) -> object:
        calls.append(step_id)
        return lookup(cache, table, tokens, step_id=step_id)  # type: ignore[arg-type]

    monkeypatch.setattr(KvCache, "lookup", counted)
    replica = replica_of(max_batch_size=8, max_num_tokens=200)
    for i in range(2_000):
        replica.submit(f"r{i}", [*PREFIX, 5] if is_shared else [i % 900 + 2] * 65, 50)
    replica.run(until=lambda: len(replica.runner.plans) == 12)
    most = max(calls.count(step_id) for step_id in range(12))
    # Rows that start, and four times as many that may park.
    assert most <= 8 + 4 * 8 + 1
    assert replica.scheduler.num_running == 8
    assert replica.scheduler.num_waiting > 1_900
