"""Who comes first, who gives way, and who runs out of time? Priorities and time-outs, one scenario each."""

from __future__ import annotations

import random

import pytest
from fake_runner import Replica, full, hybrid
from test_scheduler_properties import SETUPS, Traffic

from slipstream.core.request import RequestOptions
from slipstream.engine.scheduler import MIN_DEADLINES, Scheduler
from slipstream.engine.sequence import Sequence


def replica_of(*, num_pages: int = 400, **options: int) -> Replica:
    return Replica(full(), num_pages=num_pages, **options)


def timeout(seconds: float) -> RequestOptions:
    """Requests of a `Replica` arrive at second 0."""
    return RequestOptions(timeout_s=seconds)


def admitted(replica: Replica) -> list[str]:
    return [init.request_id for plan in replica.runner.plans for init in plan.added]


def finish(replica: Replica) -> None:
    replica.run()
    replica.check_outputs()
    replica.check_idle()


def test_a_late_urgent_request_overtakes_the_queue() -> None:
    replica = replica_of(max_batch_size=1)
    for i in range(4):
        replica.submit(f"r{i}", [10 + i] * 9, 3)
    replica.step()
    replica.submit("background", [20] * 9, 3, priority=5)
    replica.submit("urgent", [21] * 9, 3, priority=-(2**31))
    replica.submit("as urgent", [22] * 9, 3, priority=-(2**31))
    finish(replica)
    assert admitted(replica) == ["r0", "urgent", "as urgent", "r1", "r2", "r3", "background"]


@pytest.mark.parametrize("depth", [1, 2])
def test_the_last_in_order_gives_way(depth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The least urgent is preempted though it came first, and comes back last."""
    replica = replica_of(num_pages=1 + 12, depth=depth)  # a request comes to need 8 pages
    preempt = Scheduler._preempt
    victims: list[str] = []

    def noted(scheduler: Scheduler, sequence: Sequence) -> None:
        victims.append(sequence.request.request_id)
        preempt(scheduler, sequence)

    monkeypatch.setattr(Scheduler, "_preempt", noted)
    for name, priority in [("late", 2), ("urgent", 0), ("middle", 1)]:
        replica.submit(name, [10 + priority] * 24, 40, priority=priority)
    finish(replica)
    assert victims and victims[0] == "late" and "urgent" not in victims
    assert list(replica.reasons) == [("urgent", 0), ("middle", 0), ("late", 0)]


def test_an_urgent_request_waits_for_a_shared_prefix_like_any_other() -> None:
    """It parks on what a less urgent one computes; if that one leaves, it computes it itself."""
    replica = replica_of(max_num_tokens=34, depth=3)
    replica.submit("other", [5] * 9, 30)
    replica.launch()
    replica.submit("owner", [6] * 35, 3, priority=9)
    replica.launch()  # 33 tokens of the owner
    replica.submit("urgent", [6] * 35, 3)
    replica.launch()  # its last two, which the urgent request waits to copy
    assert replica.scheduler.stats.num_parked == 1
    replica.abort("owner")
    finish(replica)
    assert admitted(replica) == ["other", "owner", "urgent"]


@pytest.mark.parametrize("num_committed", [0, 1, 2])
@pytest.mark.parametrize("state", ["waiting", "parked", "prefill", "decode"])
def test_a_request_out_of_time_gives_back_exactly_its_own_pages(state: str, num_committed: int) -> None:
    replica = replica_of(depth=3, max_num_tokens=34, max_batch_size=1 if state == "waiting" else 8)
    replica.submit("other", [5] * 9, 40, options=timeout(99))
    replica.launch()
    if state == "parked":
        replica.submit("owner", [6] * 35, 4)
        replica.submit("victim", [6] * 35, 4, options=timeout(3))
    else:
        replica.submit("victim", [6] * (60 if state == "prefill" else 20), 30, options=timeout(3))
    replica.launch()
    if state == "parked":
        replica.launch()
        assert replica.scheduler.stats.num_parked == 1
        replica.commit()
    for _ in range(num_committed):
        replica.commit()
    replica.expire(2.9)
    assert replica.reasons == {}
    replica.expire(3.0)
    replica.expire(50.0)
    assert replica.reasons == {("victim", 0): "timeout"}
    while replica.scheduler.num_outstanding:
        replica.commit()
    held = [page for sequence in replica.scheduler.running() for page in sequence.table.pages[0]]
    pool = replica.cache.pool
    assert pool.num_usable - pool.num_free == len(set(held)) == len(held) and pool.num_retiring == 0
    finish(replica)
    assert replica.reasons.pop(("other", 0)) == "length"


def test_every_sample_of_a_request_runs_out_of_time() -> None:
    replica = replica_of(max_batch_size=2)
    replica.submit("a", [5] * 9, 30, n=4, options=timeout(1.0))
    for _ in range(5):
        replica.step()
    replica.expire(1.0)
    assert [replica.reasons["a", i] for i in range(4)] == ["timeout"] * 4
    assert [bool(replica.outputs["a", i]) for i in range(4)] == [True, True, False, False]
    finish(replica)


@pytest.mark.parametrize("name", ["full-overlap", "hybrid-deep"])
def test_random_deadlines_and_priorities_leave_the_books_in_order(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    reasons: list[str] = []
    for seed in range(4):
        traffic = Traffic(SETUPS[name], seed)
        replica, rng = traffic.replica, random.Random(seed)
        clock = iter(range(100_000))
        submit, step = replica.submit, replica.step

        def timed(*args: object, submit=submit, rng=rng, **kwargs: object) -> object:
            options = timeout(rng.randrange(1, 200)) if rng.random() < 0.5 else None
            return submit(*args, **kwargs, options=options, priority=rng.randrange(-2, 3))

        def ticking(step=step, replica=replica, clock=clock) -> object:
            replica.expire(float(next(clock)))
            return step()

        monkeypatch.setattr(replica, "submit", timed)
        monkeypatch.setattr(replica, "step", ticking)
        traffic.run(abort_rate=0.02)
        monkeypatch.undo()
        replica.check_outputs()
        replica.check_idle()
        reasons += replica.reasons.values()
        replica.check_reusable()
    assert min(reasons.count(reason) for reason in ("timeout", "length", "stop", "cancelled")) > 0


def test_deadlines_of_ended_requests_are_forgotten() -> None:
    """A thousand requests that end at once, each allowed a day."""
    replica = Replica(hybrid(16), num_pages=400)
    for i in range(1_000):
        replica.submit(f"r{i}", [i % 900 + 2] * 3, 1, options=timeout(86_400))
        replica.run()
    assert len(replica.scheduler._deadlines) <= 2 + MIN_DEADLINES
    finish(replica)


@pytest.mark.parametrize("length", [8, 21, 24, 25])
def test_equal_prompts_start_together_once_the_first_is_computed(length: int) -> None:
    """Each finds all it can use in the cache, so none has another's last block to wait for."""
    replica = Replica(full(), num_pages=400, max_batch_size=64, max_num_tokens=256)
    for number in range(40):
        replica.submit(f"r{number}", list(range(100, 100 + length)), 3)
    replica.run()
    replica.check_outputs()
    replica.check_idle()
    # The first alone, the others in the step after its last block is there, and three tokens each.
    assert replica.scheduler.stats.num_plans <= 6
    assert replica.scheduler.stats.executed_tokens == length + 2 + 39 * 3
