"""Are workers replaced, told, drained and gone? A supervisor over light processes and scripted engines."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from slipstream.core.errors import CheckpointError, ConfigError
from slipstream.engine.config import EngineConfig
from slipstream.engine.sockets import Endpoint
from slipstream.serve import supervisor
from slipstream.serve.listening import listen
from slipstream.serve.settings import ServeSettings
from slipstream.serve.supervisor import Supervisor
from tests.serve.live_server import wait_until
from tests.serve.oracle import DEADLINE_S


class ScriptedEngines:
    """Stands for `EngineGroup`: loads when told, fails when told."""

    processes = ()
    info: Any = "the facts"

    def __init__(self, *given: Any) -> None:
        self.may_load = threading.Event()
        self.error: Exception | None = None
        self.is_over = False
        self.num_stops = 0

    def start(self) -> list[Endpoint]:
        assert self.may_load.wait(DEADLINE_S)
        if self.error is not None:
            raise self.error
        return [Endpoint("a", "b", "c")]

    def has_ended(self) -> bool:
        return self.is_over

    def stop(self) -> None:
        self.num_stops += 1


class Run:
    def __init__(self, settings: ServeSettings) -> None:
        self.listening = listen(settings)
        self.supervisor = Supervisor(settings, EngineConfig(model="m"), self.listening)
        self.engines: Any = self.supervisor._engines
        self.ready: list[Any] = []
        self.code: int | None = None
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.code = self.supervisor.run(self.ready.append)
        except BaseException as error:
            self.error = error

    def wait_ready(self) -> Run:
        self.engines.may_load.set()
        wait_until(lambda: self.ready)
        return self

    @property
    def pids(self) -> set[int]:
        return {worker.process.pid for worker in self.supervisor._workers}

    def ask(self) -> int:
        with socket.create_connection(self.listening.getsockname(), timeout=DEADLINE_S) as peer:
            return int(peer.recv(100) or 0)

    def end(self) -> int | None:
        pids = self.pids
        self.thread.join(DEADLINE_S)
        assert not self.thread.is_alive()
        assert not [pid for pid in pids if psutil.pid_exists(pid)], "a worker is left"
        assert self.engines.num_stops == 1 and not Path(self.supervisor._folder).exists()
        return self.code


@contextlib.contextmanager
def running(monkeypatch: pytest.MonkeyPatch, **settings: Any) -> Iterator[Run]:
    monkeypatch.setattr(supervisor, "WORKER_MODULE", "tests.serve.scripted_worker")
    monkeypatch.setattr(supervisor, "EngineGroup", ScriptedEngines)
    monkeypatch.setattr(supervisor, "ENDING_S", 0.5)
    run = Run(ServeSettings(**{"port": 0, "api_workers": 2, **settings}))
    try:
        yield run
    finally:
        run.engines.may_load.set()
        run.supervisor.stop()
        run.supervisor.stop()
        run.thread.join(DEADLINE_S)
        run.listening.close()


def test_workers_share_the_socket_and_end_on_a_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    with running(monkeypatch) as run:
        assert not run.ready
        run.wait_ready()
        assert run.ready == ["the facts"] and len(run.pids) == 2
        assert run.ask() in run.pids
        run.supervisor.stop()
        assert run.end() == 0


def test_r35_a_worker_that_dies_is_replaced_and_told_where_the_engines_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with running(monkeypatch) as run:
        run.wait_ready()
        before = run.pids
        os.kill(min(before), signal.SIGKILL)
        wait_until(lambda: len(run.pids - before) == 1)
        wait_until(lambda: all(worker.is_ready.is_set() for worker in run.supervisor._workers))
        assert len(run.ready) == 1, "it is said once"


def test_r35_workers_that_die_again_and_again_end_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    with running(monkeypatch) as run:
        (Path(run.supervisor._folder) / "ill").touch()
        run.engines.may_load.set()
        assert run.end() == 1


def test_r35_the_end_of_the_engines_is_the_end_of_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    with running(monkeypatch) as run:
        run.wait_ready()
        run.engines.is_over = True
        assert run.end() == 1


def test_r37_engines_that_do_not_load_end_the_server_with_their_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with running(monkeypatch) as run:
        run.engines.error = CheckpointError("cut off")
        run.engines.may_load.set()
        run.end()
        assert run.error is run.engines.error and not run.ready


def test_r47_workers_that_do_not_end_are_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of this time-out ignore SIGTERM."""
    with running(monkeypatch, drain_timeout_s=0.25) as run:
        run.wait_ready()
        run.supervisor.stop()
        assert run.end() == 0


def test_a_stop_while_the_engines_load_ends_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    with running(monkeypatch) as run:
        wait_until(lambda: len(run.pids) == 2)
        run.supervisor.stop()
        assert run.end() == 0


def test_r78_a_full_disk_refuses_the_start_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**given: Any) -> str:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("tempfile.mkdtemp", fail)
    settings = ServeSettings(port=0, api_workers=2)
    with listen(settings) as listening, pytest.raises(ConfigError, match=r"No space left .* TMPDIR"):
        Supervisor(settings, EngineConfig(model="m"), listening)
    monkeypatch.setattr(supervisor, "EngineGroup", ScriptedEngines)
    with listen(settings) as listening, pytest.raises(ConfigError, match=r"No space left .* TMPDIR"):
        Supervisor(settings, EngineConfig(model="m"), listening)
