"""How does a recorded step become a test? A plan that adds every running row as it stands now.

A fresh runner that applies the snapshot and then the next plan computes what the old one would have: rows are
persistent, so the snapshot stands for all plans before it. The content of the pages is not in it: replay
against the same pages, or a copy of them.
"""

from __future__ import annotations

from slipstream.core.plan import StepPlan
from slipstream.engine.scheduler import Scheduler


def snapshot(scheduler: Scheduler, *, step_id: int) -> StepPlan:
    """Return a plan that brings an empty runner's rows up to date. No step may be outstanding."""
    assert not scheduler.num_outstanding, "tokens in flight are not known on the host"
    return StepPlan(step_id, added=[sequence.to_init() for sequence in scheduler.running()])
