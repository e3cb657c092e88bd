"""Who watches over several API workers and their engines? A process that answers nothing itself.

All workers accept at one socket, which they inherit, and share the engines. A worker that dies is replaced;
one that dies again and again ends the server, and so does the end of the engines. SIGTERM goes to every
worker, which drains as it would alone; the engines end after the last of them.
Invariant: when `run` returns or raises, no process that it started is left.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from slipstream.core.env import child_environment
from slipstream.core.errors import ConfigError
from slipstream.engine.config import EngineConfig
from slipstream.engine.engine_info import EngineInfo
from slipstream.engine.sockets import Endpoint
from slipstream.serve.engine_host import EngineGroup, Progress, no_folder
from slipstream.serve.settings import ServeSettings
from slipstream.serve.worker_orders import WORKER_READY, EnginesReady, Loading, News, WorkerOrder

logger = logging.getLogger(__name__)

WORKER_MODULE = "slipstream.serve.api_worker"
WATCH_S = 0.05
MAX_DEATHS = 5
DEATH_WINDOW_S = 600.0
# What workers need beside draining: to see a failed engine, to close connections, to end.
ENDING_S = 8.0
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)

OnReady = Callable[[EngineInfo], None]


@dataclasses.dataclass(slots=True, eq=False)
class Worker:
    """One API worker's process, and whether it takes requests."""

    process: subprocess.Popen[bytes]
    is_ready: threading.Event = dataclasses.field(default_factory=threading.Event)

    def tell(self, news: News) -> None:
        """Pass on news; a worker that is gone is seen elsewhere."""
        assert self.process.stdin is not None
        with contextlib.suppress(OSError, ValueError):
            self.process.stdin.write(msgspec.json.encode(news) + b"\n")

    def listen(self) -> None:
        """Wait for the line that says that it is ready."""
        assert self.process.stdout is not None
        for line in iter(self.process.stdout.readline, b""):
            if line == WORKER_READY:
                self.is_ready.set()


class Supervisor:
    """The parent of a server's processes."""

    def __init__(
        self,
        settings: ServeSettings,
        config: EngineConfig,
        listening: socket.socket,
        *,
        on_progress: Progress | None = None,
    ) -> None:
        if os.name != "posix":
            raise ConfigError("api_workers above 1 needs a POSIX system; leave it out.")
        self._settings = settings
        self._listening = listening
        self._on_progress = on_progress
        self._engines = EngineGroup(config, settings, self._show_progress)
        try:
            self._folder = tempfile.mkdtemp(prefix="slipstream-counts-")
        except OSError as error:
            self._engines.stop()
            raise no_folder(error) from None
        self._workers: list[Worker] = []
        self._deaths: list[float] = []
        self._endpoints: list[Endpoint] = []
        self._failure: BaseException | None = None
        self._num_stops = 0
        self._change = threading.Event()

    def stop(self) -> None:
        """Drain and end; called again, end at once."""
        self._num_stops += 1
        self._change.set()

    def run(self, on_ready: OnReady) -> int:
        """Run all processes until the end; returns the exit code. Raises why the engines did not start."""
        with self._handling_signals():
            try:
                self._workers = [self._spawn() for _ in range(self._settings.api_workers)]
                threading.Thread(target=self._start_engines, daemon=True).start()
                return self._watch(on_ready)
            finally:
                self._end_workers()
                self._engines.stop()
                shutil.rmtree(self._folder, ignore_errors=True)

    def _start_engines(self) -> None:
        try:
            endpoints = self._engines.start()
        except BaseException as error:
            self._failure = error
        else:
            self._endpoints = endpoints
            self._tell_all(EnginesReady(endpoints))
        self._change.set()

    def _show_progress(self, what: str, share: float) -> None:
        if self._on_progress is not None:
            self._on_progress(what, share)
        self._tell_all(Loading(what, share))

    def _tell_all(self, news: News) -> None:
        for worker in list(self._workers):
            worker.tell(news)

    def _spawn(self) -> Worker:
        fd = self._listening.fileno()
        # A session of its own: what a terminal sends to its processes is the supervisor's to pass on.
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", WORKER_MODULE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            pass_fds=(fd,),
            env=child_environment(),
            start_new_session=True,
        )
        order = WorkerOrder(
            settings=self._settings,
            listening_fd=fd,
            num_workers=self._settings.api_workers,
            counts_folder=self._folder,
            parent_pid=os.getpid(),
        )
        worker = Worker(process)
        assert process.stdin is not None
        with contextlib.suppress(OSError):
            process.stdin.write(msgspec.json.encode(order) + b"\n")
        if self._endpoints:
            worker.tell(EnginesReady(self._endpoints))
        threading.Thread(target=worker.listen, name="slipstream-worker-ready", daemon=True).start()
        return worker

    def _watch(self, on_ready: OnReady) -> int:
        is_told = False
        while not self._num_stops:
            if self._failure is not None:
                raise self._failure
            if self._endpoints and self._engines.has_ended():
                causes = {process.cause for process in self._engines.processes}
                logger.error("%s The server ends.", " ".join(sorted(causes)))
                return 1
            if not is_told and all(worker.is_ready.is_set() for worker in self._workers):
                is_told = True
                on_ready(self._engines.info)
            if not self._replace_dead():
                return 1
            self._change.wait(WATCH_S)
            self._change.clear()
        return 0

    def _replace_dead(self) -> bool:
        """Start another worker for each that has died; False where that happens too often."""
        for place, worker in enumerate(self._workers):
            status = worker.process.poll()
            if status is None:
                continue
            now = time.monotonic()
            self._deaths = [at for at in self._deaths if now - at < DEATH_WINDOW_S] + [now]
            logger.error("an API worker ended with status %d", status)
            if len(self._deaths) > MAX_DEATHS:
                logger.error("API workers ended %d times; the server ends", len(self._deaths))
                return False
            _close_pipes(worker)
            self._workers[place] = self._spawn()
        return True

    def _end_workers(self) -> None:
        """Let workers drain, then see that they are gone."""
        self._signal_all()
        deadline = time.monotonic() + self._settings.drain_timeout_s + ENDING_S
        num_stops = self._num_stops
        while any(worker.process.poll() is None for worker in self._workers):
            if self._num_stops > num_stops and num_stops < 2:
                # Asked again: they end at once, and what does not is ended.
                num_stops = 2
                self._signal_all()
                deadline = min(deadline, time.monotonic() + ENDING_S)
            if time.monotonic() > deadline:
                break
            time.sleep(WATCH_S)
        for worker in self._workers:
            if worker.process.poll() is None:
                worker.process.kill()
            worker.process.wait()
            _close_pipes(worker)

    def _signal_all(self) -> None:
        for worker in self._workers:
            if worker.process.poll() is None:
                worker.process.send_signal(signal.SIGTERM)

    @contextlib.contextmanager
    def _handling_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before: dict[Any, Any] = {number: signal.getsignal(number) for number in STOP_SIGNALS}
        for number in STOP_SIGNALS:
            signal.signal(number, lambda number, frame: self.stop())
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _close_pipes(worker: Worker) -> None:
    for pipe in (worker.process.stdin, worker.process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()
