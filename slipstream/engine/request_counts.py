"""How many requests and tokens has a process served, and how long did they take?

Plain numbers, so that those of several processes add up: `merge` is all there is to aggregation. Buckets are
the ones that dashboards for other engines expect.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable

import msgspec

from slipstream.core.outputs import RequestMetrics

TTFT_BUCKETS_S = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0),
    *(40.0, 80.0, 160.0, 640.0, 2560.0),
)
ITL_BUCKETS_S = (
    *(0.002, 0.005, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5),
    *(0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
REQUEST_BUCKETS_S = (
    *(0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)


class Histogram(msgspec.Struct):
    """Counts of values at or below each bound, and above the last one."""

    bounds: tuple[float, ...]
    counts: list[int]
    total: float = 0.0

    @classmethod
    def of(cls, bounds: tuple[float, ...]) -> Histogram:
        return cls(bounds, [0] * (len(bounds) + 1))

    def add(self, value: float | None) -> None:
        """Count a value; None, of what has not happened, counts nowhere."""
        if value is not None:
            self.counts[bisect_left(self.bounds, value)] += 1
            self.total += value

    def merge(self, other: Histogram) -> None:
        assert self.bounds == other.bounds, "processes of one server have the same buckets"
        self.counts = [a + b for a, b in zip(self.counts, other.counts, strict=True)]
        self.total += other.total


def _ttft() -> Histogram:
    return Histogram.of(TTFT_BUCKETS_S)


def _itl() -> Histogram:
    return Histogram.of(ITL_BUCKETS_S)


def _request() -> Histogram:
    return Histogram.of(REQUEST_BUCKETS_S)


class RequestCounts(msgspec.Struct):
    """Everything since the start of one process, or the sum over several.

    `finished` counts samples by finish reason. Prompt tokens count with a request's first token, or at its
    end where it has none.
    """

    num_prompt_tokens: int = 0
    num_generation_tokens: int = 0
    finished: dict[str, int] = {}
    ttft: Histogram = msgspec.field(default_factory=_ttft)
    itl: Histogram = msgspec.field(default_factory=_itl)
    e2e: Histogram = msgspec.field(default_factory=_request)
    queue: Histogram = msgspec.field(default_factory=_request)
    prefill: Histogram = msgspec.field(default_factory=_request)
    decode: Histogram = msgspec.field(default_factory=_request)

    def add_finished(self, metrics: RequestMetrics) -> None:
        """Count the times of a request that is over."""
        self.e2e.add(metrics.e2e_s)
        self.queue.add(metrics.queue_s)
        self.prefill.add(metrics.prefill_s)
        self.decode.add(metrics.decode_s)

    def merge(self, other: RequestCounts) -> None:
        self.num_prompt_tokens += other.num_prompt_tokens
        self.num_generation_tokens += other.num_generation_tokens
        # Another thread may be counting there: a copy is taken at once.
        for reason, count in list(other.finished.items()):
            self.finished[reason] = self.finished.get(reason, 0) + count
        for name in ("ttft", "itl", "e2e", "queue", "prefill", "decode"):
            getattr(self, name).merge(getattr(other, name))


def total(counts: Iterable[RequestCounts]) -> RequestCounts:
    """Return the sum over processes."""
    found = RequestCounts()
    for one in counts:
        found.merge(one)
    return found
