"""Where does a server's engine come from? Started in this process, in child processes, or already running.

Invariant: `stop` may come at any time, from any thread, and leaves no process behind; a `start` that waits
then ends too.
"""

from __future__ import annotations

import importlib
import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from slipstream.core.errors import ConfigError, EngineError
from slipstream.engine.config import EngineConfig
from slipstream.engine.engine_info import EngineInfo
from slipstream.engine.engine_process import EngineProcess
from slipstream.engine.liveness import LivenessLimits
from slipstream.engine.process_client import ProcessClient
from slipstream.engine.router_client import RouterClient
from slipstream.engine.service import EngineService, connect_service, local_service
from slipstream.engine.sockets import Endpoint
from slipstream.serve.settings import ServeSettings

Progress = Callable[[str, float], None]


class EngineHost(Protocol):
    """`start` blocks until the engine is ready; `has_ended` says that it will not come back."""

    def start(self, progress: Progress) -> EngineService: ...

    def has_ended(self) -> bool: ...

    def stop(self) -> None: ...


class InProcessHost:
    """The engine on a thread of this process."""

    def __init__(self, config: EngineConfig, settings: ServeSettings) -> None:
        self._config = config
        self._max_step_s = settings.max_step_s
        self._service: EngineService | None = None
        self._stuck_since_s: float | None = None

    def start(self, progress: Progress) -> EngineService:
        self._service = local_service(self._config, progress=progress, max_step_s=self._max_step_s)
        return self._service

    def has_ended(self) -> bool:
        """Say so too of an engine that has been stuck for as long as a process would be left alone."""
        state = "ready" if self._service is None else self._service.health().state
        if state != "stuck":
            self._stuck_since_s = None
            return state == "stopped"
        now = time.monotonic()
        self._stuck_since_s = self._stuck_since_s or now
        return now - self._stuck_since_s > LivenessLimits().kill_after_s

    def stop(self) -> None:
        service = self._service
        # A thread that does not come back from a step cannot be waited for.
        if service is not None and service.health().state != "stuck":
            service.close()


class EngineGroup:
    """The engine processes of a server, one or several of the same model."""

    def __init__(self, config: EngineConfig, settings: ServeSettings, progress: Progress) -> None:
        restart = settings.on_engine_failure == "restart"
        try:
            self.processes = [
                EngineProcess(
                    config,
                    restart=restart,
                    limits=limits_of(settings),
                    progress=progress,
                    log_json=settings.log_json,
                )
                for _ in range(settings.num_engines)
            ]
        except OSError as error:
            raise no_folder(error) from None
        self._is_stopping = threading.Event()

    def start(self) -> list[Endpoint]:
        """Start one after the other, so that only one of them reads weights. Raises why one did not."""
        for process in self.processes:
            if self._is_stopping.is_set():
                raise EngineError("The server stopped while its engine was starting.")
            process.start()
        return [process.endpoint for process in self.processes]

    @property
    def info(self) -> EngineInfo:
        info = self.processes[0].info
        assert info is not None, "it was started"
        return info

    def has_ended(self) -> bool:
        """Say whether none of them is left or will come back."""
        return all(process.wait(0.0) for process in self.processes)

    def stop(self) -> None:
        self._is_stopping.set()
        for process in self.processes:
            if process.info is None:
                # One that is loading hears nothing before it is ready.
                process.kill()
        for process in self.processes:
            process.stop()


class ChildHost:
    """Engines in processes of their own, started again where the settings say so."""

    def __init__(self, config: EngineConfig, settings: ServeSettings) -> None:
        self._settings = settings
        self._progress: Progress = lambda what, share: None
        self.group = EngineGroup(config, settings, lambda what, share: self._progress(what, share))
        self._service: EngineService | None = None

    def start(self, progress: Progress) -> EngineService:
        self._progress = progress
        preload()
        self._service = connect(self.group.start(), self._settings)
        return self._service

    def has_ended(self) -> bool:
        return self.group.has_ended()

    def stop(self) -> None:
        if self._service is not None:
            self._service.close()
        self.group.stop()


class ConnectedHost:
    """Engines that somebody else owns, at endpoints that are told once they are ready."""

    def __init__(self, settings: ServeSettings) -> None:
        self._settings = settings
        self._told = threading.Event()
        self._endpoints: list[Endpoint] = []
        self._progress: Progress = lambda what, share: None
        self._service: EngineService | None = None

    def tell_progress(self, what: str, share: float) -> None:
        self._progress(what, share)

    def tell(self, endpoints: list[Endpoint]) -> None:
        self._endpoints = endpoints
        self._told.set()

    def start(self, progress: Progress) -> EngineService:
        self._progress = progress
        preload()
        self._told.wait()
        if not self._endpoints:
            raise EngineError("The server stopped while its engine was starting.")
        self._service = connect(self._endpoints, self._settings)
        return self._service

    def has_ended(self) -> bool:
        # Whoever owns the engines ends this worker too; without a restart nothing comes after their end.
        stopped = self._service is not None and self._service.health().state == "stopped"
        return stopped and self._settings.on_engine_failure != "restart"

    def stop(self) -> None:
        self._told.set()
        if self._service is not None:
            self._service.close()


def no_folder(error: OSError) -> ConfigError:
    """Return what to say where the server cannot make a folder for its sockets or counts."""
    return ConfigError(
        f"A temporary folder cannot be made ({error.strerror or error}); free some space, or set TMPDIR to a "
        "folder that can be written."
    )


def preload() -> None:
    """Import what reads tokenizers while an engine loads: it takes seconds, and nobody waits for it yet."""
    module = "slipstream.engine.assembly"
    threading.Thread(target=importlib.import_module, args=(module,), daemon=True).start()


def limits_of(settings: ServeSettings) -> LivenessLimits:
    return LivenessLimits(max_step_s=settings.max_step_s)


def connect(endpoints: Sequence[Endpoint], settings: ServeSettings) -> EngineService:
    """Connect to engines that are ready; several of the same model serve as one. Raises EngineError."""
    awaits_restart = settings.on_engine_failure == "restart"
    limits = limits_of(settings)
    if len(endpoints) == 1:
        return connect_service(endpoints[0], awaits_restart=awaits_restart, limits=limits)
    clients: list[ProcessClient] = []
    try:
        for endpoint in endpoints:
            clients.append(ProcessClient(endpoint, awaits_restart=awaits_restart, limits=limits))
        from slipstream.engine.assembly import read_tokenizer

        source = clients[0].info.tokenizer
        tokenizer = None if source is None else read_tokenizer(source.config())
    except BaseException:
        for client in clients:
            client.close()
        raise
    return EngineService(clients[0].info, RouterClient(clients), tokenizer)
