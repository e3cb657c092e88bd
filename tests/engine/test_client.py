"""Does the in-process client take effect before the next step, and never leave its caller waiting?"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from slipstream.core.errors import EngineError, RequestError
from slipstream.core.limits import Limits
from slipstream.core.outputs import TokenEvent
from slipstream.core.request import Request
from slipstream.core.sampling_params import SamplingParams
from slipstream.engine.client import InProcessClient

LIMITS = Limits(vocab_size=100, max_seq_len=50)
DEADLINE_S = 20.0


class CountingEngine:
    """One token per step and request; notes the order of what it is told."""

    can_prepare = False

    def __init__(self) -> None:
        self.log: list[str] = []
        self.running: dict[str, Request] = {}

    @property
    def has_work(self) -> bool:
        return bool(self.running)

    def submit(self, request: Request) -> None:
        if request.request_id == "too large":
            raise RequestError("it can never fit", code="context_length_exceeded")
        self.log.append(f"submit {request.request_id}")
        self.running[request.request_id] = request

    def abort(self, request_id: str, index: int | None = None) -> list[TokenEvent]:
        self.log.append(f"abort {request_id} {index}")
        if self.running.pop(request_id, None) is None:
            return []
        return [TokenEvent(request_id, 0, finish_reason="cancelled")]

    def step(self) -> list[TokenEvent]:
        self.log.append("step")
        return [TokenEvent(request_id, 0, [1]) for request_id in self.running]


@pytest.fixture
def engine() -> CountingEngine:
    return CountingEngine()


@pytest.fixture
def client(engine: CountingEngine) -> InProcessClient:
    return InProcessClient(engine)  # type: ignore[arg-type]


def request(name: str, *, n: int = 1) -> Request:
    return Request.create([1], SamplingParams(n=n), LIMITS, request_id=name)


def while_waiting(client: InProcessClient, act: Callable[[], None]) -> list[TokenEvent]:
    """Return what `events` brought to a thread that was waiting in it when `act` was called."""
    found: list[list[TokenEvent]] = []
    thread = threading.Thread(target=lambda: found.append(client.events(DEADLINE_S)))
    started = time.monotonic()
    thread.start()
    # Long enough for the thread to wait; if it does not yet, the test is weaker, not wrong.
    time.sleep(0.05)
    act()
    thread.join(DEADLINE_S)
    assert not thread.is_alive() and time.monotonic() - started < DEADLINE_S / 2
    return found[0]


def test_what_arrived_takes_effect_before_the_step(client: InProcessClient, engine: CountingEngine) -> None:
    client.submit([request("a"), request("b")])
    client.abort("a")
    events = client.events(0.0)
    assert engine.log == ["submit a", "submit b", "abort a None", "step"]
    assert [(e.request_id, e.finish_reason) for e in events] == [("a", "cancelled"), ("b", None)]


def test_a_waiting_reader_wakes_for_a_request(client: InProcessClient) -> None:
    events = while_waiting(client, lambda: client.submit([request("a")]))
    assert [event.request_id for event in events] == ["a"]


def test_a_waiting_reader_wakes_for_an_abort(client: InProcessClient, engine: CountingEngine) -> None:
    assert while_waiting(client, lambda: client.abort("unknown", 2)) == []
    assert engine.log == ["abort unknown 2"]


def test_a_waiting_reader_wakes_at_the_end(client: InProcessClient, engine: CountingEngine) -> None:
    assert while_waiting(client, client.close) == []
    assert engine.log == []


def test_an_idle_reader_comes_back_empty_after_its_timeout(
    client: InProcessClient, engine: CountingEngine
) -> None:
    assert client.events(0.01) == []
    assert engine.log == []


def test_a_refusal_of_the_engine_is_an_event_of_every_sample(client: InProcessClient) -> None:
    client.submit([request("too large", n=2), request("b")])
    events = client.events(0.0)
    refusals = [(e.request_id, e.index, e.finish_reason, e.error) for e in events if e.error]
    error = ("it can never fit", "context_length_exceeded")
    assert refusals == [("too large", 0, "error", error), ("too large", 1, "error", error)]
    assert [e.request_id for e in events if not e.error] == ["b"]


def test_nothing_comes_in_or_out_after_the_end(client: InProcessClient, engine: CountingEngine) -> None:
    client.submit([request("a")])
    client.close()
    client.close()
    assert client.events(1.0) == [] and engine.log == []
    with pytest.raises(EngineError, match="shut down"):
        client.submit([request("b")])
    client.abort("a")  # idempotent, also at the end
