"""Do the counts of a process say what its requests did, and those of several add up?"""

from __future__ import annotations

import random

import msgspec
import pytest

from slipstream.core.limits import Limits
from slipstream.core.outputs import RequestOutput, TokenEvent
from slipstream.core.request import Request
from slipstream.core.sampling_params import SamplingParams
from slipstream.engine.output_processor import OutputProcessor
from slipstream.engine.request_counts import ITL_BUCKETS_S, Histogram, RequestCounts, total

LIMITS = Limits(vocab_size=100, max_seq_len=1000, eos_token_ids=(1,))


class Clock:
    """Stands in for the time module of the processor."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def monotonic(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("slipstream.engine.output_processor.time", clock)
    return clock


def add(processor: OutputProcessor, name: str, outputs: list[RequestOutput], *, n: int = 1) -> None:
    params = SamplingParams(n=n, max_tokens=8, detokenize=False)
    request = Request.create([5, 6, 7], params, LIMITS, request_id=name, arrival_s=99.0)
    processor.add(request, outputs.append)


def test_times_of_one_request(clock: Clock) -> None:
    processor = OutputProcessor(None)
    outputs: list[RequestOutput] = []
    add(processor, "r", outputs)
    processor.process([TokenEvent("r", 0, [8], admitted_s=99.5)])
    clock.now_s = 100.03
    processor.process([TokenEvent("r", 0, [9])])
    clock.now_s = 100.06
    last = TokenEvent("r", 0, [9], finish_reason="length", admitted_s=99.5, num_preemptions=2)
    processor.process([last])
    metrics = outputs[-1].metrics
    assert metrics is not None
    assert (metrics.queue_s, metrics.prefill_s, metrics.ttft_s) == (0.5, 0.5, 1.0)
    assert metrics.decode_s == pytest.approx(0.06) and metrics.e2e_s == pytest.approx(1.06)
    assert (metrics.last_token_s, metrics.num_preemptions) == (100.06, 2)
    counts = processor.counts
    assert (counts.num_prompt_tokens, counts.num_generation_tokens) == (3, 3)
    assert counts.finished == {"length": 1}
    assert counts.itl.counts[ITL_BUCKETS_S.index(0.03)] + counts.itl.counts[ITL_BUCKETS_S.index(0.04)] == 2
    for histogram in (counts.ttft, counts.queue, counts.prefill, counts.decode, counts.e2e):
        assert sum(histogram.counts) == 1


def test_samples_of_a_request_have_gaps_of_their_own(clock: Clock) -> None:
    processor = OutputProcessor(None)
    outputs: list[RequestOutput] = []
    add(processor, "r", outputs, n=2)
    for _ in range(3):
        clock.now_s += 0.01
        events = [TokenEvent("r", index, [8], admitted_s=99.5, num_preemptions=1) for index in (0, 1)]
        processor.process(events)
    for index in (0, 1):
        processor.process([TokenEvent("r", index, finish_reason="cancelled")])
    counts = processor.counts
    assert sum(counts.itl.counts) == 4 and counts.itl.total == pytest.approx(0.04)
    assert sum(counts.ttft.counts) == 1 and counts.num_generation_tokens == 6
    assert outputs[-1].metrics is not None and outputs[-1].metrics.num_preemptions == 2


def test_a_request_without_a_token_counts_too(clock: Clock) -> None:
    processor = OutputProcessor(None)
    outputs: list[RequestOutput] = []
    add(processor, "r", outputs)
    processor.process([TokenEvent("r", 0, finish_reason="timeout")])
    add(processor, "s", outputs)
    processor.fail_all("The engine stopped.")
    counts = processor.counts
    assert counts.finished == {"timeout": 1, "error": 1}
    assert (sum(counts.e2e.counts), sum(counts.ttft.counts), sum(counts.queue.counts)) == (1, 0, 0)
    assert counts.num_prompt_tokens == 3


def test_a_value_on_a_bound_counts_below_it() -> None:
    histogram = Histogram.of((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 2.0, 2.5, None):
        histogram.add(value)
    assert (histogram.counts, histogram.total) == ([2, 2, 1], 7.5)


def test_counts_of_processes_add_up() -> None:
    rng = random.Random(0)
    alone, workers = RequestCounts(), [RequestCounts() for _ in range(3)]
    for _ in range(500):
        value, worker = rng.expovariate(1.0), rng.choice(workers)
        for counts in (alone, worker):
            counts.e2e.add(value)
            counts.num_generation_tokens += 7
            reason = "stop" if value > 1 else "length"
            counts.finished[reason] = counts.finished.get(reason, 0) + 1
    # They cross processes as JSON.
    crossed = [msgspec.json.decode(msgspec.json.encode(one), type=RequestCounts) for one in workers]
    summed = total(crossed)
    assert summed.e2e.total == pytest.approx(alone.e2e.total)
    summed.e2e.total = alone.e2e.total
    assert summed == alone
    assert crossed[0] != alone
