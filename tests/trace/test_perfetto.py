"""Is the file for Perfetto well-formed, and does it hold what the timeline does?"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from typing import Any

from slipstream.trace.perfetto import ENGINE, REQUESTS, to_perfetto
from slipstream.trace.timeline import timeline_of
from tests.trace.samples import by_hand, of_engine


def events_of(trace: Any) -> list[dict[str, Any]]:
    return json.loads(to_perfetto(timeline_of(trace, model="m")))["traceEvents"]


def test_every_event_is_well_formed() -> None:
    """As the Trace Event Format asks: a phase, a name, a process and thread, times in microseconds."""
    for event in events_of(of_engine()):
        assert event["ph"] in {"M", "X", "C", "i"} and event["name"]
        assert isinstance(event["pid"], int) and isinstance(event["tid"], int)
        if event["ph"] != "M":
            assert event["ts"] >= 0
        if event["ph"] == "X":
            assert event["dur"] >= 0
        if event["ph"] == "C":
            assert all(isinstance(value, int | float) for value in event["args"].values())


def test_lanes_and_steps_are_there() -> None:
    events = events_of(by_hand())
    names = {
        (event["pid"], event["tid"]): event["args"]["name"]
        for event in events
        if event["name"] == "thread_name"
    }
    assert [name for (pid, _), name in sorted(names.items()) if pid == REQUESTS] == ["a", "c", "b"]
    spans = [event for event in events if event["ph"] == "X"]
    assert Counter(event["name"] for event in spans if event["pid"] == ENGINE) == {
        "plan": 5,
        "launch": 5,
        "commit": 5,
        **{f"step {number}": 1 for number in range(5, 10)},
    }
    preempted = next(event for event in spans if event["name"] == "preempted")
    assert preempted["args"]["reason"] and preempted["args"]["prompt_tokens"] == 24
    assert (round(preempted["ts"]), round(preempted["dur"])) == (35_000, 6_000)
    first = next(event for event in events if event["ph"] == "i")
    assert (first["name"], round(first["ts"])) == ("first token", 28_000)


def test_steps_on_the_device_do_not_overlap() -> None:
    steps = [event for event in events_of(of_engine(depth=2)) if event["name"].startswith("step ")]
    assert len(steps) > 10
    for before, after in itertools.pairwise(steps):
        assert after["ts"] >= before["ts"] + before["dur"] - 1e-3
