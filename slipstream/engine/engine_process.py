"""How is an engine's process started, watched and ended? For its owner: a door, or a server's supervisor.

The child is a fresh interpreter, never a fork. One thread spawns it, hears when it is ready, and watches its
heartbeat: a child that is silent or stuck for too long is killed, so that it is dead for everybody. The same
thread spawns and lives as long as the child, since Linux ties `PR_SET_PDEATHSIG` to the spawning thread.
Invariant: after `stop` there is no process, no socket and no folder left.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import msgspec

from slipstream.core.env import child_environment
from slipstream.core.errors import EngineError, SlipstreamError
from slipstream.engine.config import EngineConfig
from slipstream.engine.config_message import config_message
from slipstream.engine.engine_info import EngineInfo
from slipstream.engine.health import Health
from slipstream.engine.liveness import Liveness, LivenessLimits
from slipstream.engine.process_orders import Failed, Order, Ready, Status
from slipstream.engine.sockets import Endpoint, has_unix_sockets, make_endpoint, private_folder
from slipstream.engine.wire import error_from

logger = logging.getLogger(__name__)

ENGINE_MODULE = "slipstream.engine.engine_child"
WATCH_S = 0.1
# An engine that dies this often within the window is not started again.
MAX_RESTARTS = 5
RESTART_WINDOW_S = 600.0
STOP_S = 5.0

Progress = Callable[[str, float], None]


class EngineProcess:
    """One engine in a process of its own. `endpoint` and `info` are of the engine once it is ready."""

    def __init__(
        self,
        config: EngineConfig,
        *,
        restart: bool = False,
        limits: LivenessLimits | None = None,
        module: str = ENGINE_MODULE,
        use_tcp: bool = False,
        progress: Progress | None = None,
        log_json: bool = False,
    ) -> None:
        self._config = config_message(config)
        self._restart = restart
        self._limits = limits or LivenessLimits()
        self._module = module
        self._progress = progress
        self._log_json = log_json
        self._folder = None if use_tcp or not has_unix_sockets() else private_folder()
        try:
            self.endpoint: Endpoint = make_endpoint(self._folder)
        except BaseException:
            self._clean()
            raise
        self.info: EngineInfo | None = None
        self.num_starts = 0
        self._liveness: Liveness | None = None
        self._child: subprocess.Popen[bytes] | None = None
        self._error: SlipstreamError | None = None
        self._cause = ""
        self._settled = threading.Event()
        self._ended = threading.Event()
        self._is_stopping = False
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="slipstream-engine-watch", daemon=True)

    def start(self) -> None:
        """Start the process and wait until it is ready. Raises what kept it from starting."""
        self._thread.start()
        try:
            self._settled.wait()
        except BaseException:
            self.stop()
            raise
        if self._error is not None:
            self._thread.join()
            raise self._error

    @property
    def pid(self) -> int | None:
        child = self._child
        return None if child is None else child.pid

    @property
    def cause(self) -> str:
        """Why the last process ended, "" while the first one runs."""
        return self._cause

    def health(self) -> Health:
        """Say how the process is; never waits for it."""
        liveness = self._liveness
        if self._ended.is_set() or liveness is None:
            return Health("stopped", self._cause or "The engine is starting.")
        return liveness.health()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until the process has ended for good; False after `timeout_s`."""
        return self._ended.wait(timeout_s)

    def stop(self, *, drain_s: float = 0.0) -> None:
        """End the process: after what runs, within `drain_s`, or else after its present step. Idempotent."""
        with self._lock:
            self._is_stopping = True
        if drain_s > 0:
            self._tell(b"drain\n")
            self._ended.wait(drain_s)
        self._tell(b"stop\n")
        if self._thread.ident is not None and not self._ended.wait(STOP_S):
            self.kill()
        if self._thread.ident is not None and threading.current_thread() is not self._thread:
            self._thread.join()
        self._clean()

    def kill(self) -> None:
        """End the present process at once; where it is to be restarted, it is."""
        child = self._child
        if child is not None:
            child.kill()

    def _tell(self, word: bytes) -> None:
        child = self._child
        if child is not None and child.stdin is not None:
            with contextlib.suppress(OSError, ValueError):
                child.stdin.write(word)

    def _run(self) -> None:
        deaths: list[float] = []
        try:
            while True:
                try:
                    self._serve_once()
                except SlipstreamError as error:
                    self._error, self._cause = error, str(error)
                    return
                except Exception as error:
                    logger.exception("an engine's process could not be started or understood")
                    self._cause = f"The engine's process could not be started: {type(error).__name__}."
                    self._error = EngineError(self._cause)
                    return
                now = time.monotonic()
                deaths = [at for at in deaths if now - at < RESTART_WINDOW_S] + [now]
                if self._is_stopping or not self._restart:
                    return
                if len(deaths) > MAX_RESTARTS:
                    self._cause += f" It has ended {len(deaths)} times and is not started again."
                    return
                logger.warning("%s It is started again.", self._cause)
        finally:
            self._ended.set()
            self._settled.set()
            self._clean()

    def _clean(self) -> None:
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _serve_once(self) -> None:
        """Run one child to its end. Raises where it does not come to be ready."""
        with self._lock:
            if self._is_stopping:
                raise EngineError("The engine is shut down.")
            child = self._child = self._spawn()
        try:
            ready = self._hear(child)
            self.endpoint, self.info = ready.endpoint, ready.info
            self.num_starts += 1
            self._liveness = Liveness(self.endpoint, child.pid, self._limits)
            self._settled.set()
            self._watch(child, self._liveness)
        finally:
            child.kill()
            child.wait()
            liveness, self._liveness = self._liveness, None
            if liveness is not None:
                liveness.close()
            for pipe in (child.stdin, child.stdout):
                with contextlib.suppress(OSError):
                    if pipe is not None:
                        pipe.close()

    def _spawn(self) -> subprocess.Popen[bytes]:
        # A session of its own: Ctrl-C, and what else a terminal sends, is for the parent to decide.
        child = subprocess.Popen(
            [sys.executable, "-P", "-m", self._module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env=child_environment(),
            start_new_session=True,
        )
        order = Order(self._config, self.endpoint, os.getpid(), self._log_json)
        assert child.stdin is not None
        with contextlib.suppress(OSError):
            child.stdin.write(msgspec.json.encode(order) + b"\n")
        return child

    def _hear(self, child: subprocess.Popen[bytes]) -> Ready:
        """Pass on progress until the child is ready. Raises where it is not to be."""
        assert child.stdout is not None
        doing = "starting"
        for line in iter(child.stdout.readline, b""):
            status: Status = msgspec.json.decode(line, type=Status)
            if isinstance(status, Ready):
                return status
            if isinstance(status, Failed):
                raise error_from((status.kind, status.message))
            doing = status.what
            if self._progress is not None:
                self._progress(status.what, status.share)
        raise EngineError(f"{_ending(child)} while {doing}; its standard error may say why.")

    def _watch(self, child: subprocess.Popen[bytes], liveness: Liveness) -> None:
        """Wait for the child's end; kill it where it does not come back."""
        while child.poll() is None:
            liveness.listen(WATCH_S)
            if liveness.is_lost:
                self._cause = liveness.health().cause
                logger.error("%s It is killed.", self._cause)
                child.kill()
                child.wait()
                return
        self._cause = "The engine is shut down." if self._is_stopping else f"{_ending(child)}."


def _ending(child: subprocess.Popen[Any]) -> str:
    """Say how a process ended."""
    status = child.wait()
    if status < 0:
        with contextlib.suppress(ValueError):
            return f"The engine's process was ended by {signal.Signals(-status).name}"
    return f"The engine's process ended with status {status}"


def start_engine_process(config: EngineConfig, **options: Any) -> EngineProcess:
    """Start an engine in a process of its own and wait until it is ready.

    `options` are those of `EngineProcess`. Raises ConfigError, CheckpointError, OutOfMemoryError or
    EngineError where the engine cannot start.
    """
    process = EngineProcess(config, **options)
    process.start()
    return process
