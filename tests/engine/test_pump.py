"""Does the engine's thread keep its promises? Every request ends, and no thread stays, whatever fails."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Sequence

import pytest

from slipstream.core.errors import EngineError, RequestError
from slipstream.core.limits import Limits
from slipstream.core.outputs import RequestOutput, TokenEvent
from slipstream.core.request import Request
from slipstream.core.sampling_params import SamplingParams
from slipstream.engine.output_processor import OutputProcessor
from slipstream.engine.pump import Pump

LIMITS = Limits(vocab_size=100, max_seq_len=50)
# Catches a hang only; everything here takes milliseconds.
DEADLINE_S = 20.0


class ScriptedClient:
    """Hands out prepared events; what is submitted and aborted is noted."""

    def __init__(self) -> None:
        self.submitted: list[str] = []
        self.aborted: list[tuple[str, int | None]] = []
        self.is_closed = False
        self._script: deque[list[TokenEvent] | Exception] = deque()
        self._wake = threading.Condition()

    def script(self, step: list[TokenEvent] | Exception) -> None:
        with self._wake:
            self._script.append(step)
            self._wake.notify()

    def submit(self, requests: Sequence[Request]) -> None:
        if self.is_closed:
            raise EngineError("closed")
        self.submitted += [request.request_id for request in requests]

    def abort(self, request_id: str, index: int | None = None) -> None:
        self.aborted.append((request_id, index))

    def events(self, timeout_s: float) -> list[TokenEvent]:
        with self._wake:
            self._wake.wait_for(lambda: self._script or self.is_closed, timeout_s)
            step = self._script.popleft() if self._script else []
        if isinstance(step, Exception):
            raise step
        return step

    def close(self) -> None:
        with self._wake:
            self.is_closed = True
            self._wake.notify_all()


class Listener:
    """Collects outputs and says when the last one came."""

    def __init__(self) -> None:
        self.outputs: list[RequestOutput] = []
        self.is_done = threading.Event()

    def __call__(self, output: RequestOutput) -> None:
        self.outputs.append(output)
        if output.finished:
            self.is_done.set()

    def wait(self) -> RequestOutput:
        assert self.is_done.wait(DEADLINE_S), "no last output came"
        return self.outputs[-1]


@pytest.fixture
def client() -> ScriptedClient:
    return ScriptedClient()


@pytest.fixture
def pump(client: ScriptedClient) -> Iterator[Pump]:
    pump = Pump(client, OutputProcessor(None))
    yield pump
    pump.stop()
    assert not pump._thread.is_alive()


def request(name: str, **params: int) -> Request:
    return Request.create([1], SamplingParams(**params), LIMITS, request_id=name)  # type: ignore[arg-type]


def test_events_reach_the_listener(pump: Pump, client: ScriptedClient) -> None:
    listener = Listener()
    pump.submit([(request("a"), listener)], streams=True)
    assert client.submitted == ["a"]
    client.script([TokenEvent("a", 0, [7])])
    client.script([TokenEvent("a", 0, [8], finish_reason="length")])
    assert listener.wait().outputs[0].token_ids == [7, 8]
    assert len(listener.outputs) == 2


def test_a_failing_engine_ends_every_request_and_refuses_new_ones(pump: Pump, client: ScriptedClient) -> None:
    listeners = [Listener(), Listener()]
    pump.submit([(request("a"), listeners[0])])
    pump.submit([(request("b", n=2), listeners[1])])
    client.script(RuntimeError("the device is gone"))
    for listener in listeners:
        error = listener.wait().error
        assert error is not None and error.code == "engine_stopped"
        assert "RuntimeError: the device is gone" in error.message
    assert client.is_closed
    with pytest.raises(EngineError, match="the device is gone"):
        pump.submit([(request("c"), Listener())])
    pump._thread.join(DEADLINE_S)
    assert not pump._thread.is_alive()


def test_stop_ends_what_is_pending_and_may_be_called_again(pump: Pump, client: ScriptedClient) -> None:
    listener = Listener()
    pump.submit([(request("a"), listener)])
    pump.stop()
    assert not pump._thread.is_alive() and client.is_closed
    error = listener.wait().error
    assert error is not None and error.code == "engine_stopped" and "shut down" in error.message
    pump.stop()
    with pytest.raises(EngineError, match="shut down"):
        pump.submit([(request("b"), Listener())])
    assert pump.processor.num_pending == 0


def test_stop_from_a_listener_does_not_wait_for_itself(pump: Pump, client: ScriptedClient) -> None:
    is_done = threading.Event()

    def stop(output: RequestOutput) -> None:
        pump.stop()
        is_done.set()

    pump.submit([(request("a"), stop)])
    client.script([TokenEvent("a", 0, [7], finish_reason="length")])
    assert is_done.wait(DEADLINE_S)
    pump._thread.join(DEADLINE_S)
    assert not pump._thread.is_alive()


def test_a_batch_is_queued_whole_or_not_at_all(pump: Pump, client: ScriptedClient) -> None:
    first = Listener()
    pump.submit([(request("a"), first)])
    with pytest.raises(RequestError, match="'a' is in use"):
        pump.submit([(request("b"), Listener()), (request("a"), Listener()), (request("c"), Listener())])
    assert client.submitted == ["a"]
    assert pump.processor.num_pending == 1
    # The refused batch can come again under free names; the running request was not touched.
    pump.submit([(request("b"), Listener())])
    client.script([TokenEvent("a", 0, [7], finish_reason="length")])
    assert first.wait().error is None


def test_a_batch_that_the_client_refuses_leaves_nothing_pending(pump: Pump, client: ScriptedClient) -> None:
    client.is_closed = True
    with pytest.raises(EngineError):
        pump.submit([(request("a"), Listener())])
    assert pump.processor.num_pending == 0


def test_stops_found_in_the_output_are_aborted(pump: Pump, client: ScriptedClient) -> None:
    def raise_always(output: RequestOutput) -> None:
        raise RuntimeError("a listener")

    after = Listener()
    pump.submit([(request("a"), raise_always)], streams=True)
    pump.submit([(request("b"), after)])
    client.script([TokenEvent("a", 0, [7])])
    client.script([TokenEvent("b", 0, [7], finish_reason="length")])
    after.wait()
    assert client.aborted == [("a", 0)]


def test_many_threads_may_submit(pump: Pump, client: ScriptedClient) -> None:
    listeners = [Listener() for _ in range(40)]

    def submit(part: int) -> None:
        for i in range(part, 40, 4):
            pump.submit([(request(f"r{i}"), listeners[i])])

    threads = [threading.Thread(target=submit, args=(part,)) for part in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
    assert sorted(client.submitted) == sorted(f"r{i}" for i in range(40))
    client.script([TokenEvent(f"r{i}", 0, [i], finish_reason="length") for i in range(40)])
    assert [listener.wait().outputs[0].token_ids for listener in listeners] == [[i] for i in range(40)]
