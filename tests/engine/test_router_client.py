"""Do several engines serve as one: the least loaded takes the next, and a dead one takes nobody along?"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from slipstream.core.errors import EngineError, RequestError
from slipstream.core.outputs import TokenEvent
from slipstream.core.request import Request
from slipstream.engine.client import InProcessClient
from slipstream.engine.process_client import ProcessClient
from slipstream.engine.router_client import RouterClient
from slipstream.engine.service import EngineService
from tests.engine.served import DEADLINE_S, INFO, Stream, eventually, fake_client, prompt, serving

STEP_S = 0.002


class MortalClient(InProcessClient):
    """An engine that can be made to die, and counts what it was given."""

    def __init__(self, *, step_s: float = STEP_S) -> None:
        inner = fake_client(step_s=step_s)
        super().__init__(inner.engine, inner._commands)
        self.num_submitted = 0
        self.is_dead = False

    def submit(self, requests: Sequence[Request]) -> None:
        super().submit(requests)
        self.num_submitted += len(requests)

    def events(self, timeout_s: float) -> list[TokenEvent]:
        if self.is_dead:
            raise EngineError("this engine is dead")
        return super().events(min(timeout_s, 0.02))


@pytest.fixture
def clients() -> list[MortalClient]:
    return [MortalClient() for _ in range(3)]


@pytest.fixture
def service(clients: list[MortalClient]) -> Iterator[EngineService]:
    before = threading.active_count()
    service = EngineService(INFO, RouterClient(clients), None)
    yield service
    service.close()
    eventually(lambda: threading.active_count() <= before, "threads are left")


def is_at_rest(client: MortalClient) -> bool:
    pool = client.engine.scheduler.cache.pool
    return client.is_idle and pool.num_free == pool.num_usable


def test_streams_are_what_they_would_be_alone(service: EngineService, clients: list[MortalClient]) -> None:
    streams = [Stream(service, prompt(i), 10 + i, n=1 + i % 2) for i in range(12)]
    for stream in streams:
        stream.check()
    assert [client.num_submitted for client in clients] == [4, 4, 4]
    for client in clients:
        eventually(lambda: is_at_rest(client), "pages are left")  # noqa: B023


def test_the_engine_with_the_fewest_outstanding_tokens_takes_the_next(
    service: EngineService, clients: list[MortalClient]
) -> None:
    long = Stream(service, prompt(1), 5000).begin()
    short = [Stream(service, prompt(i), 20) for i in range(10)]
    for stream in short:
        stream.check()
    assert sorted(client.num_submitted for client in clients) == [1, 5, 5]
    long.abort()
    assert long.wait().outputs[0].finish_reason == "cancelled"
    # Its tokens no longer count.
    for i in range(3):
        Stream(service, prompt(i), 5).check()
    eventually(lambda: all(is_at_rest(client) for client in clients), "pages are left")


def test_r35_a_dead_engine_fails_its_own_requests_alone(
    service: EngineService, clients: list[MortalClient]
) -> None:
    streams = [Stream(service, prompt(i), 300).begin() for i in range(6)]
    clients[1].is_dead = True
    errors = [output.error for output in (stream.wait() for stream in streams)]
    failed = [error for error in errors if error is not None]
    assert len(failed) == 2 and all(error.code == "engine_stopped" for error in failed)
    assert all("this engine is dead" in error.message for error in failed)
    for stream, error in zip(streams, errors, strict=True):
        if error is None:
            stream.check()
    health = service.health()
    assert health.is_ready and "Engine 1: this engine is dead" in health.cause
    for i in range(4):
        Stream(service, prompt(i), 5).check()
    assert clients[1].num_submitted == 2
    for client in (clients[0], clients[2]):
        client.is_dead = True
    eventually(lambda: service.health().state == "stopped", "all are dead, and nobody knows")
    with pytest.raises(EngineError, match="this engine is dead"):
        Stream(service, prompt(1), 5)


def test_a_refusal_is_its_requests_own(service: EngineService, clients: list[MortalClient]) -> None:
    clients[0].engine.refusal = RequestError("asleep", code="engine_asleep")
    # An engine that sleeps is passed over while another is awake.
    for i in range(4):
        Stream(service, prompt(i), 5).check()
    assert clients[0].num_submitted == 0
    for client in clients:
        client.engine.refusal = RequestError("asleep", code="engine_asleep")
    error = Stream(service, prompt(1), 5).wait().error
    assert error is not None and error.code == "engine_asleep"
    assert service.health().state == "asleep"


def test_commands_go_to_all(service: EngineService, clients: list[MortalClient]) -> None:
    Stream(service, prompt(1), 5).check()
    stats = service.stats().result(DEADLINE_S)
    assert stats["num_pages"] == 3 * 4000 and len(stats["engines"]) == 3
    assert stats["finish_reasons"] == {"length": 1}
    assert service.command("echo", x=1).result(DEADLINE_S) == [{"x": 1}] * 3
    with pytest.raises(ZeroDivisionError):
        service.command("fail").result(DEADLINE_S)
    clients[2].is_dead = True
    eventually(lambda: service.health().cause, "nobody notices")
    assert len(service.stats().result(DEADLINE_S)["engines"]) == 2


def test_commands_pass_over_an_engine_that_is_being_started_again(
    service: EngineService, clients: list[MortalClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*args: Any) -> Any:
        raise EngineError("it is being started again")

    monkeypatch.setattr(clients[0], "command", gone)
    assert len(service.stats().result(DEADLINE_S)["engines"]) == 2
    for client in clients:
        monkeypatch.setattr(client, "command", gone)
    with pytest.raises(EngineError):
        service.command("echo", x=1)


def test_engines_in_processes_of_their_own() -> None:
    with serving(fake_client(step_s=STEP_S)) as one, serving(fake_client(step_s=STEP_S)) as other:
        clients: list[Any] = [ProcessClient(server.endpoint) for server in (one, other)]
        service = EngineService(INFO, RouterClient(clients), None)
        try:
            streams = [Stream(service, prompt(i), 200).begin() for i in range(4)]
            other.stop()
            errors = [stream.wait().error for stream in streams]
            assert [error is None for error in errors].count(False) == 2
            for stream, error in zip(streams, errors, strict=True):
                if error is None:
                    stream.check()
            Stream(service, prompt(1), 5).check()
            assert service.health().is_ready and service.health().cause
        finally:
            service.close()
        # What the stopped engine was at is let go of, so that the books balance.
        for request_id, _ in list(other._client.engine.scheduler._sequences):
            other._client.engine.abort(request_id)
        while other._client.engine.has_work:
            other._client.engine.step()


def test_a_router_needs_an_engine() -> None:
    with pytest.raises(ValueError, match="at least one"):
        RouterClient([])
