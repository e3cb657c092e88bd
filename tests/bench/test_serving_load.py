"""Are requests sent when they should be, all of them, and does a run end?"""

from __future__ import annotations

import asyncio
import itertools
import statistics
from collections.abc import Iterator

import pytest

from slipstream.bench.serving_client import ServingClient, Target
from slipstream.bench.serving_load import Bound, ClosedLoop, Load, OpenLoop, Sent
from slipstream.bench.serving_record import ServingRequest
from slipstream.core.errors import ConfigError
from tests.bench.fake_openai import MODEL, FakeServer, Script, fake_server


def endless() -> Iterator[ServingRequest]:
    return (ServingRequest(f"prompt {number}", 2) for number in itertools.count())


def run(
    server: FakeServer, load: Load, bound: Bound, requests: Iterator[ServingRequest] | None = None
) -> Sent:
    async def main() -> Sent:
        async with ServingClient(Target(url=server.url, endpoint="completions", model=MODEL)) as client:
            return await load.run(client, requests or endless(), bound)

    return asyncio.run(asyncio.wait_for(main(), 60))


def moments_of(load: OpenLoop, count: int) -> list[float]:
    return list(itertools.islice(load._moments(), count))


def test_closed_loop_keeps_so_many_in_flight() -> None:
    with fake_server(Script(first_s=0.03)) as server:
        sent = run(server, ClosedLoop(3), Bound(num_requests=12))
        assert server.most_at_once == 3
    assert len(sent.records) == len(server.served) == 12
    assert {served.body["prompt"] for served in server.served} == {f"prompt {n}" for n in range(12)}
    assert sent.wall_s >= 4 * 0.03 and sent.lags_s and sent.client_cpu_share > 0


def test_duration_begins_no_further_request_and_waits_for_the_rest() -> None:
    with fake_server(Script(first_s=0.05)) as server:
        sent = run(server, ClosedLoop(2), Bound(duration_s=0.2))
    assert 2 <= len(sent.records) <= 2 * 5
    assert all(record.is_complete for record in sent.records)
    assert max(record.sent_s for record in sent.records) - min(r.sent_s for r in sent.records) < 0.2
    assert sent.wall_s >= 0.2


def test_open_loop_does_not_wait_for_answers() -> None:
    with fake_server(Script(first_s=0.5)) as server:
        sent = run(server, OpenLoop(rate=100.0, arrivals="constant", seed=0), Bound(num_requests=10))
        assert server.most_at_once == 10
    due = sorted(record.due_s for record in sent.records)
    assert [b - a for a, b in itertools.pairwise(due)] == pytest.approx([0.01] * 9)
    assert all(record.late_s >= 0 for record in sent.records)


def test_an_infinite_rate_sends_all_at_once() -> None:
    with fake_server(Script(first_s=0.5)) as server:
        sent = run(server, OpenLoop(rate=float("inf"), arrivals="poisson", seed=0), Bound(num_requests=8))
        assert server.most_at_once == 8
    assert len({record.due_s for record in sent.records}) == 1


def test_a_trace_brings_its_moments() -> None:
    requests = [ServingRequest("a", 2, 0.0), ServingRequest("b", 2, 0.05), ServingRequest("c", 2, 0.3)]
    load = OpenLoop(rate=None, arrivals="poisson", seed=0)
    with fake_server() as server:
        sent = run(server, load, Bound(), iter(requests))
        due = [record.due_s - sent.records[0].due_s for record in sent.records]
        assert due == pytest.approx([0.0, 0.05, 0.3])
        assert len(run(server, load, Bound(duration_s=0.2), iter(requests)).records) == 2


def test_a_late_client_makes_the_server_look_slower() -> None:
    """Times count from when a request was due: a loop that was blocked cannot hide behind its own delay."""
    load = OpenLoop(rate=50.0, arrivals="constant", seed=0)

    def blocking() -> Iterator[ServingRequest]:
        for number in itertools.count():
            if number == 1:
                import time

                time.sleep(0.3)
            yield ServingRequest("x", 2)

    with fake_server() as server:
        # Without a number of requests prompts are drawn as the run goes.
        sent = run(server, load, Bound(duration_s=0.1), blocking())
    late = [record.late_s for record in sent.records]
    assert max(late) > 0.15 and all(r.ttft_s is not None and r.ttft_s >= r.late_s for r in sent.records)


def test_poisson_arrivals() -> None:
    """Gaps of an exponential distribution: mean and spread both 1 / rate, within 10% for 4,000 gaps."""
    moments = moments_of(OpenLoop(rate=20.0, arrivals="poisson", seed=1), 4001)
    gaps = [b - a for a, b in itertools.pairwise(moments)]
    assert statistics.fmean(gaps) == pytest.approx(0.05, rel=0.1)
    assert statistics.pstdev(gaps) == pytest.approx(0.05, rel=0.1)
    assert moments == moments_of(OpenLoop(rate=20.0, arrivals="poisson", seed=1), 4001)
    assert moments != moments_of(OpenLoop(rate=20.0, arrivals="poisson", seed=2), 4001)


def test_faults_do_not_end_a_run() -> None:
    with fake_server(Script(fault="http_503", fault_on=frozenset({1, 3}))) as server:
        sent = run(server, ClosedLoop(2), Bound(num_requests=8))
    assert [record.error_kind for record in sent.records].count("http_503") == 2 and len(sent.records) == 8


@pytest.mark.parametrize("fields", [{"num_requests": 0}, {"duration_s": 0.0}, {"duration_s": float("nan")}])
def test_impossible_bounds(fields: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        Bound(**fields)  # type: ignore[arg-type]
