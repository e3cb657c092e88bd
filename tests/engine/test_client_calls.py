"""Does a call run between two steps, in order, and does one that waits for idle hold back only requests?"""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

import pytest

from slipstream.core.errors import EngineError
from slipstream.engine.client import InProcessClient
from tests.engine.test_client import CountingEngine, request


@pytest.fixture
def engine() -> CountingEngine:
    return CountingEngine()


@pytest.fixture
def client(engine: CountingEngine) -> InProcessClient:
    return InProcessClient(engine)  # type: ignore[arg-type]


def note(client: InProcessClient, name: str, *, when_idle: bool = False) -> Future[Any]:
    return client.call(lambda engine: engine.log.append(name), when_idle=when_idle)  # type: ignore[attr-defined]


def drain(client: InProcessClient, rounds: int = 1) -> None:
    for _ in range(rounds):
        client.events(0.0)


def test_a_call_runs_in_its_order_and_before_the_step(
    client: InProcessClient, engine: CountingEngine
) -> None:
    client.submit([request("a")])
    future = note(client, "call")
    client.submit([request("b")])
    drain(client)
    assert engine.log == ["submit a", "call", "submit b", "step"]
    assert future.done() and future.result() is None


def test_a_call_sees_what_happened_before_it(client: InProcessClient, engine: CountingEngine) -> None:
    """An abort before it has an event; that is out, and so processed, before the call looks."""
    client.submit([request("a")])
    drain(client)
    client.abort("a")
    future = note(client, "call")
    events = client.events(0.0)
    assert [event.finish_reason for event in events] == ["cancelled"] and not future.done()
    drain(client)
    assert future.done()


def test_what_a_call_raises_is_the_futures(client: InProcessClient, engine: CountingEngine) -> None:
    failing = client.call(lambda engine: 1 / 0)
    cancelled = note(client, "never")
    assert cancelled.cancel()
    after = note(client, "after")
    drain(client)
    assert isinstance(failing.exception(), ZeroDivisionError)
    assert after.done() and engine.log == ["after"]


def test_an_idle_call_waits_for_what_runs_and_requests_wait_for_it(
    client: InProcessClient, engine: CountingEngine
) -> None:
    client.submit([request("a"), request("b")])
    drain(client)
    idle = note(client, "idle", when_idle=True)
    client.submit([request("c")])
    client.abort("c")
    look = note(client, "look")
    drain(client, 3)
    # Looking on goes on; c is behind the call, and so is its abort.
    assert (
        look.done() and not idle.done() and "submit c" not in engine.log and "abort c None" not in engine.log
    )
    client.abort("a")
    client.abort("b")
    drain(client, 3)
    assert idle.done()
    end = engine.log[engine.log.index("idle") :]
    assert end == ["idle", "submit c", "abort c None"]
    assert engine.log.index("abort a None") < engine.log.index("idle")


def test_an_idle_call_into_an_idle_engine_runs_at_once(
    client: InProcessClient, engine: CountingEngine
) -> None:
    first, second = note(client, "first", when_idle=True), note(client, "second", when_idle=True)
    client.submit([request("a")])
    drain(client)
    assert first.done() and second.done()
    assert engine.log == ["first", "second", "submit a", "step"]


def test_calls_that_were_not_begun_fail_at_the_end(client: InProcessClient, engine: CountingEngine) -> None:
    waiting, cancelled = note(client, "waiting"), note(client, "cancelled")
    cancelled.cancel()
    client.close()
    assert isinstance(waiting.exception(), EngineError) and engine.log == []
    with pytest.raises(EngineError, match="shut down"):
        note(client, "late")
