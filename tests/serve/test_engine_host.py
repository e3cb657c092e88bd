"""Does an engine that will not come back count as ended, and does a stopped host let go of a start?"""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from slipstream.core.errors import EngineError
from slipstream.engine.config import EngineConfig
from slipstream.engine.health import Health
from slipstream.engine.liveness import LivenessLimits
from slipstream.serve import engine_host
from slipstream.serve.engine_host import ChildHost, ConnectedHost, InProcessHost
from slipstream.serve.settings import ServeSettings
from tests.serve.live_server import wait_until
from tests.serve.oracle import DEADLINE_S

CONFIG = EngineConfig(model="nowhere")


class Service:
    """Stands for an `EngineService`: is as a test says, and notes that it was closed."""

    def __init__(self) -> None:
        self.state: Any = "ready"
        self.is_closed = False

    def health(self) -> Health:
        return Health(self.state)

    def close(self) -> None:
        self.is_closed = True


def test_r36_an_engine_stuck_in_this_process_counts_as_ended_after_a_while(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    host, service = InProcessHost(CONFIG, ServeSettings(in_process=True)), Service()
    host._service = service  # type: ignore[assignment]
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    assert not host.has_ended()
    service.state = "stuck"
    assert not host.has_ended()
    now[0] += LivenessLimits().kill_after_s - 1
    assert not host.has_ended()
    service.state = "ready"
    assert not host.has_ended(), "it came back"
    service.state = "stuck"
    assert not host.has_ended()
    now[0] += LivenessLimits().kill_after_s + 1
    assert host.has_ended()
    host.stop()
    assert not service.is_closed, "its thread cannot be waited for"
    service.state = "stopped"
    assert host.has_ended()
    host.stop()
    assert service.is_closed


def starting(host: Any) -> tuple[threading.Thread, list[BaseException]]:
    errors: list[BaseException] = []

    def run() -> None:
        try:
            host.start(lambda what, share: None)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, errors


def test_a_worker_that_is_stopped_before_its_engine_is_there_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_host, "preload", lambda: None)
    host = ConnectedHost(ServeSettings())
    thread, errors = starting(host)
    host.stop()
    thread.join(DEADLINE_S)
    assert isinstance(errors[0], EngineError)


def test_a_stop_ends_a_child_that_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    """The child's interpreter takes longer to start than this test to stop it."""
    monkeypatch.setattr(engine_host, "preload", lambda: None)
    host = ChildHost(CONFIG, ServeSettings())
    thread, errors = starting(host)
    wait_until(lambda: host.group.processes[0].pid is not None)
    started = time.monotonic()
    host.stop()
    thread.join(DEADLINE_S)
    assert not thread.is_alive() and errors and time.monotonic() - started < DEADLINE_S
    assert host.has_ended()


def test_several_engines_share_a_host() -> None:
    host = ChildHost(CONFIG, ServeSettings(num_engines=3))
    assert len(host.group.processes) == 3
    assert len({process.endpoint.address for process in host.group.processes}) == 3
    host.stop()
