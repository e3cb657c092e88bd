"""Does one row's failure stay its own? NaN rows, failed loads, and who read what they wrote.

The fake runner spreads NaN as attention would: whoever reads a bad slot writes bad ones. A request may fail
only by its own doing; every other one ends with the output it has alone.
"""

from __future__ import annotations

import pytest
from fake_runner import Replica, full
from test_scheduler_properties import SETUPS, Traffic

from slipstream.cache.block_table import BlockTable
from slipstream.cache.kv_cache import KvCache

PREFIX = list(range(100, 132))  # four blocks of 8


def replica_of(depth: int, **options: int) -> Replica:
    return Replica(full(), num_pages=100, block_tokens=8, depth=depth, **options)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_nan_row_fails_alone(depth: int) -> None:
    replica = replica_of(depth)
    for i in range(4):
        replica.submit(f"r{i}", [10 + i] * 20, 12)
    replica.runner.nan_at["r2", 0] = 25  # while decoding
    replica.run()
    assert [replica.reasons[f"r{i}", 0] for i in range(4)] == ["length", "length", "error", "length"]
    errors = [event.error for event in replica.events if event.error]
    assert errors == [("NaN in the logits", "numerical_error")]
    assert len(replica.outputs["r2", 0]) == 6  # the logits at positions 19 to 24 were clean
    assert replica.scheduler.stats.num_rewound == 0
    replica.check_outputs()
    replica.check_idle()


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_readers_of_a_nan_row_are_rewound_and_finish(depth: int) -> None:
    replica = replica_of(depth)
    for i in range(4):
        replica.submit(f"r{i}", [*PREFIX, 10 + i, 11], 12)
    replica.runner.nan_at["r0", 0] = 9  # in the prefix that r0 computes for all
    replica.run()
    assert [key for key, reason in replica.reasons.items() if reason == "error"] == [("r0", 0)]
    assert replica.scheduler.stats.num_rewound >= 3
    replica.check_outputs()
    replica.check_idle()


def test_nan_before_the_end_of_a_prompt_reaches_no_sibling() -> None:
    """The prefix takes several chunks; siblings wait, and nobody reads the bad blocks later either."""
    replica = replica_of(2, max_num_tokens=16)
    for i in range(3):
        replica.submit(f"r{i}", [*PREFIX, 10 + i], 6)
    replica.runner.nan_at["r0", 0] = 2
    replica.run()
    assert [key for key, reason in replica.reasons.items() if reason == "error"] == [("r0", 0)]
    assert replica.events[-1].num_cached_tokens == len(PREFIX)  # what r1 recomputed serves r2
    replica.check_outputs()
    replica.check_idle()


def test_reader_of_a_copied_nan_block_is_rewound() -> None:
    """The copy is a page of the reader's own, so the page alone does not tell where its content came from."""
    replica = replica_of(3)
    replica.submit("bad", [5, 6, 7, 8, 9], 8)
    replica.runner.nan_at["bad", 0] = 1
    replica.launch()
    replica.submit("good", [5, 6, 7, 8, 9, 10], 8)
    plan = replica.launch()
    assert plan is not None and len(plan.copies) == 1 and plan.added[0].num_computed == 5
    replica.run()
    assert replica.reasons == {("bad", 0): "error", ("good", 0): "length"}
    replica.check_outputs()
    replica.check_idle()


def test_bad_pages_come_back_zeroed() -> None:
    replica = Replica(full(), num_pages=5, block_tokens=8, depth=2)
    replica.submit("bad", [5] * 20, 10)
    replica.runner.nan_at["bad", 0] = 18
    replica.run()
    bad = {page for pages in replica.runner.plans[0].added[0].blocks for page in pages}
    replica.submit("good", [6] * 20, 10)
    replica.run()
    copies = [copy for plan in replica.runner.plans for copy in plan.copies]
    assert bad and bad <= {target for source, target in copies if source == 0}
    assert len(copies) == len(set(copies))  # once: they are clean after that
    replica.check_outputs()
    replica.check_idle()


def test_a_page_is_not_zeroed_and_copied_onto_in_one_step() -> None:
    """Copies of one step run in no order, so a page may be the target of one only."""
    replica = Replica(full(), num_pages=4, block_tokens=8, depth=1)
    replica.submit("bad", [5] * 18, 4)
    replica.runner.nan_at["bad", 0] = 3
    replica.run()
    replica.submit("first", [6] * 5, 2)
    replica.run()
    replica.submit("second", [6] * 5, 2)  # copies the first one's tail onto a page that was bad
    replica.run()
    assert replica.scheduler.stats.num_copied_blocks == 1
    replica.check_outputs()


@pytest.mark.parametrize("reuse", [True, False])
def test_error_of_a_preempted_row_in_flight_cleans_its_pages(reuse: bool) -> None:
    """The victim's step was launched before it left; its pages are no longer in its table when NaN shows."""
    replica = Replica(full(), num_pages=6, block_tokens=8, depth=2, enable_block_reuse=reuse)
    replica.submit("old", [5] * 15, 20)
    replica.submit("young", [6] * 15, 20)
    replica.runner.nan_at["young", 0] = 15
    replica.run(until=lambda: replica.scheduler.stats.num_preemptions > 0)
    replica.run()
    replica.submit("next", [7] * 30, 8)
    replica.run()
    assert replica.reasons == {("old", 0): "length", ("young", 0): "error", ("next", 0): "length"}
    replica.check_outputs()
    replica.check_idle()


@pytest.mark.parametrize("depth", [2, 3])
def test_aborted_row_that_turns_out_bad_takes_no_reader_with_it(depth: int) -> None:
    replica = replica_of(depth)
    replica.submit("bad", [*PREFIX, 5], 8)
    replica.submit("good", [*PREFIX, 6], 8)
    replica.runner.nan_at["bad", 0] = 20
    replica.launch()
    replica.abort("bad")
    replica.run()
    assert replica.reasons == {("bad", 0): "cancelled", ("good", 0): "length"}
    assert replica.scheduler.stats.num_rewound == 1
    replica.check_outputs()
    replica.check_idle()


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_failed_load_rewinds_its_readers(depth: int) -> None:
    """All who share the page go back to before it, and find it no more."""
    replica = replica_of(depth)
    for i in range(3):
        replica.submit(f"r{i}", [*PREFIX, 10 + i], 12)
    plan = replica.launch()
    assert plan is not None
    page = plan.added[0].blocks[0][1]
    replica.runner.fail_loads[plan.step_id + 1] = [page]
    replica.run()
    assert replica.scheduler.stats.num_rewound == 3
    # The pages after the failed one were computed from it, so no prompt finds more than the first block.
    again = [init for plan in replica.runner.plans[1:] for init in plan.added]
    assert min(init.num_computed for init in again) == 8
    copies = [copy for plan in replica.runner.plans for copy in plan.copies]
    assert (0, page) in copies or all(page not in init.blocks[0] for init in again)
    assert set(replica.reasons.values()) == {"length"}
    replica.check_outputs()
    replica.check_idle()


def test_counters_of_a_rewound_row_balance() -> None:
    replica = replica_of(3)
    for i in range(2):
        replica.submit(f"r{i}", [*PREFIX, 10 + i], 12)
    replica.runner.nan_at["r0", 0] = 9
    replica.run(until=lambda: replica.scheduler.stats.num_rewound > 0)
    survivor = replica.scheduler._sequences["r1", 0]
    replica.run()
    assert survivor.num_in_flight == 0 and survivor.num_computed == survivor.num_scheduled
    replica.check_outputs()


def run_bad_traffic(name: str, num_seeds: int) -> tuple[int, int]:
    """Run random traffic in which a quarter of the requests turn NaN; returns (errors, rewinds)."""
    errors = rewinds = 0
    for seed in range(num_seeds):
        traffic = Traffic(SETUPS[name], seed, nan_rate=0.25)
        traffic.run(abort_rate=0.02)
        replica = traffic.replica
        replica.check_outputs()
        replica.check_idle()
        failed = {key for key, reason in replica.reasons.items() if reason == "error"}
        assert failed <= replica.runner.nan_at.keys(), "a healthy request failed"
        errors += len(failed)
        rewinds += replica.scheduler.stats.num_rewound
        replica.check_reusable()
    return errors, rewinds


@pytest.mark.parametrize("name", SETUPS)
def test_random_nan_rows_fail_alone(name: str) -> None:
    errors, rewinds = run_bad_traffic(name, 3)
    assert errors > 3
    # Blocks of 32 are longer than most prefixes here, so few share one.
    assert (rewinds > 0) == SETUPS[name].reuse or SETUPS[name].block_tokens == 32


def test_harness_notices_pages_that_stay_findable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(KvCache, "condemn", lambda cache, table: set())
    with pytest.raises(AssertionError):
        run_bad_traffic("full-overlap", 8)


def test_harness_notices_readers_that_are_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BlockTable, "has_read", lambda table, bad: False)
    with pytest.raises(AssertionError, match="a healthy request failed"):
        run_bad_traffic("hybrid-deep", 8)
