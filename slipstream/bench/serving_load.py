"""When are requests sent? Closed loop: so many at a time. Open loop: at moments of their own.

Invariant: no request that was begun is left out; the run ends when the last answer has. The client watches
itself: how late its event loop runs and how much of a core it uses, because a client that cannot follow
measures itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from random import Random
from typing import Any, Protocol, TypeVar

from slipstream.bench.serving_client import ServingClient
from slipstream.bench.serving_record import RequestRecord, ServingRequest
from slipstream.core.errors import ConfigError

T = TypeVar("T")

LAG_INTERVAL_S = 0.01


class Load(Protocol):
    """A way to send requests. `label` names the load point in tables and plots."""

    @property
    def label(self) -> str: ...

    async def run(self, client: ServingClient, requests: Iterator[ServingRequest], bound: Bound) -> Sent: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bound:
    """When no further request is begun: after so many, after so long, or at the end of the workload."""

    num_requests: int | None = None
    duration_s: float | None = None

    def __post_init__(self) -> None:
        if self.num_requests is not None and self.num_requests < 1:
            raise ConfigError(f"--num-requests {self.num_requests} must be at least 1.")
        if self.duration_s is not None and not self.duration_s > 0:
            raise ConfigError(f"--duration {self.duration_s:g} must be above 0 seconds.")

    def limit(self, requests: Iterator[ServingRequest]) -> Iterator[ServingRequest]:
        return requests if self.num_requests is None else itertools.islice(requests, self.num_requests)

    def is_over(self, started_s: float) -> bool:
        return self.duration_s is not None and time.perf_counter() - started_s >= self.duration_s


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sent:
    """What a run brought, and how the client fared meanwhile."""

    records: list[RequestRecord]
    wall_s: float
    lags_s: list[float]
    client_cpu_share: float


@dataclasses.dataclass(frozen=True)
class ClosedLoop:
    """`concurrency` clients, each of which sends its next request when its last one has ended."""

    concurrency: int

    @property
    def label(self) -> str:
        return f"c={self.concurrency}"

    async def run(self, client: ServingClient, requests: Iterator[ServingRequest], bound: Bound) -> Sent:
        limited = bound.limit(requests)
        records: list[RequestRecord] = []

        async def one_client() -> None:
            for request in limited:
                if bound.is_over(started_s):
                    return
                records.append(await client.send(request))

        started_s = time.perf_counter()
        async with watched() as finish:
            await asyncio.gather(*(one_client() for _ in range(self.concurrency)))
            return finish(records)


@dataclasses.dataclass(frozen=True)
class OpenLoop:
    """Requests at moments of their own: Poisson or constant arrivals at `rate` a second, or those of a trace.

    An infinite rate sends all at once.
    """

    rate: float | None
    arrivals: str
    seed: int

    @property
    def label(self) -> str:
        return "trace" if self.rate is None else f"r={self.rate:g}/s"

    async def run(self, client: ServingClient, requests: Iterator[ServingRequest], bound: Bound) -> Sent:
        tasks: list[asyncio.Task[RequestRecord]] = []
        # Drawn ahead of the start where that is finite: prompts take time to write.
        limited = bound.limit(requests)
        planned = zip(self._moments(), limited, strict=False)
        ready = iter(list(planned)) if bound.num_requests is not None else planned
        async with watched() as finish:
            started_s = time.perf_counter()
            for moment, request in ready:
                after_s = moment if self.rate is not None else request.due_s or 0.0
                if bound.duration_s is not None and after_s >= bound.duration_s:
                    break
                await sleep_until(started_s + after_s)
                # Due when the plan says so, even where this loop is late.
                tasks.append(asyncio.create_task(client.send(request, due_s=started_s + after_s)))
            return finish(list(await asyncio.gather(*tasks)))

    def _moments(self) -> Iterator[float]:
        generator = Random(f"{self.seed}/arrivals")
        moment = 0.0
        while True:
            yield moment
            if self.rate is not None and self.rate != float("inf"):
                moment += generator.expovariate(self.rate) if self.arrivals == "poisson" else 1 / self.rate


async def sleep_until(moment_s: float) -> None:
    wait_s = moment_s - time.perf_counter()
    # A passed moment gives others their turn too, or a burst would keep the loop from sending anything.
    await asyncio.sleep(max(0.0, wait_s))


Finish = Callable[[list[RequestRecord]], Sent]


@contextlib.asynccontextmanager
async def watched() -> AsyncIterator[Finish]:
    """Watch this process while requests run; yields a function that turns their records into a `Sent`."""
    lags_s: list[float] = []
    task = asyncio.create_task(_measure_lag(lags_s))
    started_s, cpu_s = time.perf_counter(), time.process_time()

    def finish(records: list[RequestRecord]) -> Sent:
        wall_s = time.perf_counter() - started_s
        share = (time.process_time() - cpu_s) / wall_s
        return Sent(records=records, wall_s=wall_s, lags_s=lags_s, client_cpu_share=share)

    try:
        yield finish
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def _measure_lag(lags_s: list[float]) -> None:
    while True:
        before = time.perf_counter()
        await asyncio.sleep(LAG_INTERVAL_S)
        lags_s.append(max(0.0, time.perf_counter() - before - LAG_INTERVAL_S))


def run_in_loop(main: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine on the fastest event loop there is."""
    try:
        import uvloop
    except ImportError:
        return asyncio.run(main)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main)
