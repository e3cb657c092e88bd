"""Do lanes and curves tell what the records hold, and is a gap in them not made up?"""

from __future__ import annotations

import itertools

import msgspec
import pytest

from slipstream.engine.step_records import EngineTrace, RequestEvent
from slipstream.trace.timeline import Lane, Timeline, timeline_of
from tests.trace.samples import WHY, by_hand, of_engine


def lane_of(timeline: Timeline, name: str) -> Lane:
    (lane,) = (lane for lane in timeline.lanes if lane.request_id == name)
    return lane


def phases_of(lane: Lane) -> list[tuple[str, float, float]]:
    return [(phase.kind, round(phase.start_s, 4), round(phase.end_s, 4)) for phase in lane.phases]


def test_a_request_that_was_preempted() -> None:
    lane = lane_of(timeline_of(by_hand(), model="m"), "a")
    assert phases_of(lane) == [
        ("queued", 0.0, 0.011),
        ("prefill", 0.011, 0.028),
        ("decode", 0.028, 0.035),
        ("preempted", 0.035, 0.041),
        # It computes again what it knew, and goes on from there.
        ("prefill", 0.041, 0.048),
        ("decode", 0.048, 0.059),
    ]
    assert lane.phases[3].note == WHY
    assert (lane.num_prompt_tokens, lane.num_cached_tokens, lane.num_output_tokens) == (24, 4, 4)
    assert (lane.num_preemptions, lane.outcome, lane.is_cut) == (1, "length", False)
    assert lane.ttft_s == pytest.approx(0.028)
    chunks = [(chunk.step_id, chunk.start, chunk.num_tokens) for chunk in lane.chunks]
    assert chunks == [(5, 4, 16), (6, 20, 4), (8, 0, 22)]
    assert (lane.chunks[0].start_s, lane.chunks[0].end_s) == pytest.approx((0.011, 0.018))


def test_a_request_that_goes_on_and_one_that_began_before() -> None:
    timeline = timeline_of(by_hand(), model="m")
    waiting, old = lane_of(timeline, "b"), lane_of(timeline, "c")
    assert phases_of(waiting) == [("queued", 0.015, 0.1)] and waiting.outcome == ""
    assert phases_of(old) == [("decode", 0.0, 0.019)]
    assert old.is_cut and old.ttft_s is None and old.num_prompt_tokens is None
    assert [lane.request_id for lane in timeline.lanes] == ["a", "c", "b"]


def test_steps_keep_their_times_and_counts() -> None:
    timeline = timeline_of(by_hand(), model="m")
    first = timeline.steps[0]
    times = (first.planned_s, first.scheduled_s, first.launched_s, first.collected_s, first.committed_s)
    assert times == pytest.approx((0.010, 0.011, 0.012, 0.018, 0.019))
    assert (first.num_decode_tokens, first.num_prefill_tokens, first.num_rows) == (1, 16, 2)
    assert [step.kv_usage for step in timeline.steps] == [0.25, 0.25, 0.25, 0.5, 0.25]
    assert (timeline.num_dropped_steps, timeline.num_pages) == (5, 100)
    assert timeline.began == "2023-11-14T22:13:20.000+00:00" and timeline.duration_s == pytest.approx(0.1)


def test_an_idle_engine_is_not_drawn_idling() -> None:
    trace = by_hand()
    trace.events = [event for event in trace.events if event.request_id != "b"]
    assert timeline_of(trace, model="m").duration_s == pytest.approx(0.059)


def test_an_id_that_is_used_again_has_two_lanes() -> None:
    trace = by_hand()
    trace.events += [RequestEvent(100.06, "queued", "a", 0, num_tokens=9)]
    lanes = [lane for lane in timeline_of(trace, model="m").lanes if lane.request_id == "a"]
    assert [lane.num_prompt_tokens for lane in lanes] == [24, 9]
    assert [lane.outcome for lane in lanes] == ["length", ""]


def test_what_is_said_after_the_end_opens_no_lane() -> None:
    trace = by_hand()
    trace.events += [RequestEvent(100.06, "first_token", "c", 0, step_id=5)]
    assert len(timeline_of(trace, model="m").lanes) == 3
    assert phases_of(lane_of(timeline_of(trace, model="m"), "c")) == [("decode", 0.0, 0.019)]


def test_nothing_happened_yet() -> None:
    timeline = timeline_of(EngineTrace(now_s=5.0, wall_s=50.0, num_pages=0), model="m")
    assert (timeline.lanes, timeline.steps, timeline.duration_s) == ([], [], 0.0)


def test_a_step_that_is_out_goes_on_to_the_end() -> None:
    trace = by_hand()
    trace.steps[-1] = msgspec.structs.replace(trace.steps[-1], collected_s=0.0, committed_s=0.0)
    last = timeline_of(trace, model="m").steps[-1]
    assert (last.collected_s, last.committed_s) == pytest.approx((0.1, 0.1))


@pytest.mark.parametrize("depth", [1, 2])
def test_a_real_engine_leaves_whole_lanes(depth: int) -> None:
    """Every lane is a chain of phases without gaps from its arrival to its end, and chunks add up."""
    timeline = timeline_of(of_engine(depth=depth), model="m")
    assert len(timeline.lanes) == 8 and sum(lane.num_preemptions for lane in timeline.lanes) > 0
    for lane in timeline.lanes:
        assert lane.outcome == "length" and lane.num_output_tokens == 30 and not lane.is_cut
        for before, after in itertools.pairwise(lane.phases):
            assert before.end_s == after.start_s and before.start_s <= before.end_s
        assert lane.phases[0].kind == "queued" and lane.phases[-1].kind == "decode"
        kinds = [phase.kind for phase in lane.phases]
        assert kinds.count("preempted") == lane.num_preemptions
        assert kinds.count("prefill") == 1 + lane.num_preemptions
        assert lane.num_cached_tokens is not None
        first = [chunk for chunk in lane.chunks if chunk.end_s <= lane.phases[1].end_s + 1e-9]
        assert sum(chunk.num_tokens for chunk in first) + lane.num_cached_tokens == 13
    assert sum(lane.num_cached_tokens or 0 for lane in timeline.lanes) > 0
    tokens = sum(step.num_prefill_tokens for step in timeline.steps)
    assert tokens == sum(chunk.num_tokens for lane in timeline.lanes for chunk in lane.chunks)
