"""Does the ring tell what the engine did? Steps and requests, in order, in bounded memory, cheaply."""

from __future__ import annotations

import dataclasses
import time
import tracemalloc

import msgspec
import pytest

from slipstream.core.request import Request
from slipstream.core.sampling_params import SamplingParams
from slipstream.engine.engine import Engine
from slipstream.engine.request_notes import READ_BAD_PAGES, SHORT_OF_PAGES
from slipstream.engine.step_records import EngineTrace, RequestEvent, StepRecord, StepRecords
from tests.engine.fake_runner import LIMITS, Replica, full


def engine_of(replica: Replica) -> Engine:
    return Engine(replica.scheduler, replica.runner, depth=replica.depth)  # type: ignore[arg-type]


def run(engine: Engine, *, max_steps: int = 2000) -> None:
    for _ in range(max_steps):
        if not engine.has_work:
            return
        engine.step()
    raise AssertionError(f"not done after {max_steps} steps")


def kinds_of(trace: EngineTrace, name: str) -> list[str]:
    return [event.kind for event in trace.events if event.request_id == name]


@pytest.mark.parametrize("depth", [1, 2])
def test_a_request_leaves_its_whole_way(depth: int) -> None:
    replica = Replica(full(), num_pages=200, depth=depth, max_num_tokens=16)
    engine = engine_of(replica)
    replica.submit("a", range(2, 42), 5)
    run(engine)
    trace = engine.trace()
    assert kinds_of(trace, "a") == [
        "queued",
        "admitted",
        "chunk",
        "chunk",
        "chunk",
        "first_token",
        "finished",
    ]
    chunks = [event for event in trace.events if event.kind == "chunk"]
    assert [(event.start, event.num_tokens, event.step_id) for event in chunks] == [
        (0, 16, 0),
        (16, 16, 1),
        (32, 8, 2),
    ]
    assert (trace.events[-1].reason, trace.events[-1].num_tokens) == ("length", 5)
    assert [step.step_id for step in trace.steps] == list(range(7))
    assert [step.num_prefill_tokens for step in trace.steps] == [16, 16, 8, 0, 0, 0, 0]
    assert [step.num_decode_tokens for step in trace.steps] == [0, 0, 0, 1, 1, 1, 1]
    for step in trace.steps:
        assert 0 < step.planned_s <= step.launched_s <= step.collected_s <= step.committed_s
        assert (step.num_rows, step.num_running, step.num_waiting) == (1, 1, 0)
        assert 0 < step.num_free_pages < trace.num_pages


def test_a_request_of_one_token_ends_after_it() -> None:
    replica = Replica(full(), num_pages=200)
    engine = engine_of(replica)
    replica.submit("a", [5, 6], 1)
    run(engine)
    assert kinds_of(engine.trace(), "a") == ["queued", "admitted", "chunk", "first_token", "finished"]


def test_cache_hits_and_queueing_are_told() -> None:
    replica = Replica(full(), num_pages=200, max_batch_size=1)
    engine = engine_of(replica)
    replica.submit("a", range(2, 34), 3)
    replica.submit("b", [*range(2, 34), 77, 78], 3)
    run(engine)
    trace = engine.trace()
    admitted = {event.request_id: event for event in trace.events if event.kind == "admitted"}
    assert admitted["a"].num_tokens == 0
    assert admitted["b"].num_tokens == 32
    assert admitted["b"].step_id > admitted["a"].step_id
    assert trace.steps[0].num_waiting == 1
    stats = replica.scheduler.stats
    assert (stats.num_queried_tokens, stats.num_cached_tokens) == (32 + 34, 32)


def test_a_preemption_says_why() -> None:
    replica = Replica(full(), num_pages=12, max_batch_size=4)
    engine = engine_of(replica)
    for name in "abc":
        replica.submit(name, [ord(name)] * 9, 30)
    run(engine)
    preempted = [event for event in engine.trace().events if event.kind == "preempted"]
    assert preempted and {event.reason for event in preempted} == {SHORT_OF_PAGES}
    assert replica.scheduler.stats.num_preemptions == len(preempted)
    name = preempted[0].request_id
    kinds = kinds_of(engine.trace(), name)
    assert kinds.count("admitted") == 1 + kinds.count("preempted")
    assert kinds.count("first_token") == 1 and kinds[-1] == "finished"


def test_a_reader_of_bad_pages_says_so() -> None:
    replica = Replica(full(), num_pages=100, depth=2, max_batch_size=4, max_num_tokens=16)
    engine = engine_of(replica)
    shared = list(range(2, 26))
    replica.submit("bad", [*shared, 30], 4)
    replica.submit("reader", [*shared, 31, 32], 4)
    # The page comes out wrong while the reader has already matched it.
    replica.runner.nan_at[("bad", 0)] = 10
    run(engine)
    events = engine.trace().events
    assert [event.reason for event in events if event.kind == "preempted"] == [READ_BAD_PAGES]
    assert [event.reason for event in events if event.request_id == "bad"][-1] == "error"


def test_a_first_token_event_says_how_it_came() -> None:
    replica = Replica(full(), num_pages=200)
    started = time.monotonic()
    replica.submit("a", range(2, 34), 4)
    replica.run()
    first, *middle, last = replica.events
    for event in (first, last):
        assert event.admitted_s is not None and started <= event.admitted_s <= time.monotonic()
    assert {event.admitted_s for event in middle} == {None}
    replica.submit("b", range(2, 40), 4)
    before = len(replica.events)
    replica.run()
    assert replica.events[before].num_cached_tokens == 32


def test_a_search_leaves_one_way() -> None:
    replica = Replica(full(), num_pages=200)
    engine = engine_of(replica)
    replica.submit("s", range(2, 12), 6, n=2, beam_width=3)
    run(engine)
    assert kinds_of(engine.trace(), "s") == ["queued", "admitted", "chunk", "first_token", "finished"]


def a_request(name: str) -> Request:
    return Request.create([5], SamplingParams(max_tokens=1), LIMITS, request_id=name)


def test_memory_is_bounded_and_the_oldest_goes_first() -> None:
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        records = StepRecords()
        for number in range(9_000):
            records.add_step(StepRecord(number, 1e6 + number, 1e6, 1e6, 1e6, *(300 + number,) * 7))
        request = a_request("r")
        for number in range(34_000):
            if number % 4 == 0:
                # Ids as the server makes them.
                request = dataclasses.replace(request, request_id=f"cmpl-{number:032d}")
            records.add_event("chunk", request, step_id=300 + number, start=300 + number, num_tokens=number)
        used = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert used < 16 * 2**20
    trace = records.trace(num_pages=1)
    assert (len(trace.steps), trace.num_dropped_steps) == (8192, 9_000 - 8192)
    assert (len(trace.events), trace.num_dropped_events) == (32_768, 34_000 - 32_768)
    assert trace.steps[-1].step_id == 8_999 and trace.steps[0].step_id == 9_000 - 8192


def test_a_trace_is_plain_data_and_a_copy() -> None:
    records = StepRecords()
    step = StepRecord(3, 1.0, num_rows=2)
    records.add_step(step)
    records.add_event("queued", a_request("é\n"), num_tokens=1)
    trace = records.trace(num_pages=7)
    step.launched_s = 2.0
    assert trace.steps[0].launched_s == 0.0
    again = msgspec.json.decode(msgspec.json.encode(trace), type=EngineTrace)
    assert again == trace
    assert abs((trace.wall_s - trace.now_s) - (time.time() - time.monotonic())) < 1.0


def test_events_come_out_in_the_order_of_their_times() -> None:
    records = StepRecords()
    request = a_request("r")
    records.add_event("admitted", request, at_s=5.0)
    records.add_event("queued", request, at_s=1.0)
    assert [event.kind for event in records.trace(num_pages=1).events] == ["queued", "admitted"]
    assert isinstance(records.trace(num_pages=1).events[0], RequestEvent)
