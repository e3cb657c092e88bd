"""Do KV events tell all that happens to the prefix index? Replayed after any step, they are the index."""

from __future__ import annotations

import pytest
from test_scheduler_properties import SETUPS, Traffic

from slipstream.core.plan import StepPlan
from tests.cache.router import Router, index_of


@pytest.mark.parametrize("name", ["full-overlap", "full-no-partial", "hybrid-deep", "window-only"])
def test_replayed_events_are_the_index(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Looked at after every step: evictions, withdrawn pages, aborts and resets included."""
    kinds: dict[str, int] = {}
    for seed in range(4):
        # A seventh of the rows fail, and what they wrote is withdrawn.
        traffic = Traffic(SETUPS[name], seed, nan_rate=0.15, event_buffer_max_size=100_000)
        replica, router = traffic.replica, Router()
        step = replica.step

        def looking(traffic: Traffic = traffic, router: Router = router, step=step) -> StepPlan | None:
            replica = traffic.replica
            plan = step()
            if traffic.rng.random() < 0.02:
                replica.cache.reset_prefix_cache()
            events = replica.scheduler.drain_kv_events()
            router.apply(events)
            assert router.blocks == index_of(replica.cache)
            for event in events:
                kinds[event["type"]] = kinds.get(event["type"], 0) + 1
            return plan

        monkeypatch.setattr(replica, "step", looking)
        traffic.run(abort_rate=0.02)
        monkeypatch.undo()
        replica.check_outputs()
        replica.check_idle()
    assert kinds.keys() == {"stored", "removed", "cleared"} and min(kinds.values()) > 5
