"""Does each capacity policy keep its promise? Random traffic over the fake runner, and small scenarios.

Where a policy promises that something never happens, the same traffic under MAX_UTILIZATION shows that it
would have.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from fake_runner import Replica, full, hybrid
from test_scheduler_properties import SETUPS, Traffic, run_traffic

from slipstream.cache.kv_cache import KvCache
from slipstream.core.plan import StepPlan
from slipstream.engine.scheduler import Scheduler

GRID = ["full", "full-overlap", "full-no-reuse", "hybrid", "hybrid-deep", "hybrid-no-partial", "window-only"]


def setup_of(name: str, policy: str) -> Any:
    return dataclasses.replace(SETUPS[name], policy=policy)


@pytest.mark.parametrize("name", GRID)
def test_no_evict_never_preempts_and_starves_nobody(name: str) -> None:
    """`run_traffic` checks that every request ends with the output that it has alone."""
    totals = run_traffic(setup_of(name, "GUARANTEED_NO_EVICT"))
    assert totals["num_preemptions"] == 0 and totals["num_plans"] > 500
    assert run_traffic(setup_of(name, "MAX_UTILIZATION"))["num_preemptions"] > 0


def test_pages_that_two_hold_are_promised_to_neither(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a window leaves comes back only if nobody else holds it: counted for each, rows run short."""

    def counting_shared(cache: KvCache, table: Any, num_tokens: int, *, max_span: int) -> int:
        bound = cache._window_blocks(window + max_span) + 1
        blocks = -(-num_tokens // cache.block_tokens) - table.capacity // cache.block_tokens
        live = [len(pages) - first for pages, first in zip(table.pages, table.first_live, strict=True)]
        return sum(max(0, min(blocks, bound - held)) for held in live)

    window, shared = 64, list(range(100, 164))

    def run() -> int:
        """Eight requests that share a window's worth of prompt, in a pool for a few of them."""
        replica = Replica(
            hybrid(window)[:1], num_pages=1 + 40, max_num_tokens=16, policy="GUARANTEED_NO_EVICT"
        )
        for i in range(8):
            replica.submit(f"r{i}", [*shared, 10 + i], 100)
        replica.run()
        replica.check_outputs()
        assert replica.scheduler.stats.num_cached_tokens >= 4 * 64
        return replica.scheduler.stats.num_preemptions

    assert run() == 0
    monkeypatch.setattr(KvCache, "pages_ahead", counting_shared)
    assert run() > 0


def test_no_evict_counts_a_request_at_its_longest() -> None:
    """Eight pages each, nineteen usable: two run at a time, though three prompts would fit."""
    most: dict[str, int] = {}
    for policy in ("GUARANTEED_NO_EVICT", "MAX_UTILIZATION"):
        replica = Replica(full(), num_pages=20, policy=policy)
        for i in range(5):
            replica.submit(f"r{i}", [10 + i] * 24, 40)
        while replica.scheduler.has_work:
            replica.step()
            most[policy] = max(most.get(policy, 0), replica.scheduler.num_running)
        replica.check_outputs()
        replica.check_idle()
    assert most["GUARANTEED_NO_EVICT"] == 2 < most["MAX_UTILIZATION"]


def test_whoever_waits_is_looked_at_when_pages_come_back() -> None:
    """Though fewer are free than when it was refused: what the others still need has shrunk too."""
    replica = Replica(full(), num_pages=21, policy="GUARANTEED_NO_EVICT")
    replica.submit("short", [5] * 8, 48, end=20)  # counted as 7 pages; it ends with 4
    replica.submit("long", [6] * 8, 72)  # counted as 10
    replica.submit("next", [7] * 8, 72)
    replica.run(until=lambda: ("short", 0) in replica.reasons)
    assert replica.cache.pool.num_free == 16
    plan = replica.step()
    assert plan is not None and [init.request_id for init in plan.added] == ["next"]
    replica.run()
    replica.check_outputs()
    replica.check_idle()


@pytest.mark.parametrize("name", GRID)
def test_static_batch_admits_only_into_an_empty_engine(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plan_once = Scheduler.plan
    batches: list[int] = []

    def plan(scheduler: Scheduler) -> StepPlan | None:
        num_before = scheduler.num_running
        made = plan_once(scheduler)
        if made is not None and made.added:
            assert num_before == 0, f"{len(made.added)} admitted beside {num_before} running"
            batches.append(len(made.added))
        return made

    monkeypatch.setattr(Scheduler, "plan", plan)
    totals = run_traffic(setup_of(name, "STATIC_BATCH"))
    assert totals["num_preemptions"] == 0 and totals["num_plans"] > 500
    assert max(batches) > 2


def test_a_static_batch_runs_to_its_end() -> None:
    replica = Replica(full(), num_pages=200, max_batch_size=3, policy="STATIC_BATCH")
    for i, max_tokens in enumerate([3, 9, 5, 4, 4]):
        replica.submit(f"r{i}", [10 + i] * 9, max_tokens)
    replica.run()
    added = [(plan.step_id, len(plan.added)) for plan in replica.runner.plans if plan.added]
    # The longest of the first three makes nine steps.
    assert added == [(0, 3), (9, 2)]
    replica.check_outputs()
    replica.check_idle()


@pytest.mark.parametrize("policy", ["MAX_UTILIZATION", "GUARANTEED_NO_EVICT", "STATIC_BATCH"])
@pytest.mark.parametrize("name", ["full-overlap", "hybrid-deep"])
def test_aborts_at_any_moment_leave_the_books_in_order(name: str, policy: str) -> None:
    for seed in range(4):
        traffic = Traffic(setup_of(name, policy), seed)
        traffic.run(abort_rate=0.3)
        assert "cancelled" in traffic.replica.reasons.values()
        traffic.replica.check_outputs()
        traffic.replica.check_idle()
        traffic.replica.check_reusable()
