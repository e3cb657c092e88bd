"""How does one API worker live? It listens, loads, serves, drains, and ends with an exit code.

It listens before the engine is ready, so that probes learn what goes on: `context.refusal` is why new work is
refused, and what `/ready` tells. Phases: loading; serving, until somebody asks it to stop or the engine
fails; draining, in which answers that are under way go on for `drain_timeout_s`; the end. A second request to
stop ends it at once.
Invariants: it serves only after the engine has generated a token through the whole path; it never lives on
with an engine that does not come back; signal handlers are put back as they were.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import uvicorn

from slipstream.core.errors import EngineError, RequestError
from slipstream.engine.engine_info import EngineInfo
from slipstream.engine.health import Health
from slipstream.engine.service import EngineService
from slipstream.serve.admission import Admission, bounds_for
from slipstream.serve.app import create_app
from slipstream.serve.context import ServeContext
from slipstream.serve.engine_host import EngineHost, Progress
from slipstream.serve.errors import RETRY_AFTER, ApiError
from slipstream.serve.health import DRAINING, STATES, cause_of, start_probe
from slipstream.serve.host_check import HostCheck
from slipstream.serve.http_guard import guarded_protocol
from slipstream.serve.metrics import ServeMetrics
from slipstream.serve.settings import ServeSettings

logger = logging.getLogger(__name__)

WATCH_S = 0.25
# What a failed engine leaves to the answers that say so, and to a probe that may see it.
FAILURE_GRACE_S = 1.5
WARM_UP_S = 120.0
# After draining: what closing connections may take.
CLOSE_S = 2
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)

OnReady = Callable[[EngineInfo], None]


class UvicornServer(uvicorn.Server):
    """uvicorn without handlers of its own: who runs the process decides what a signal means."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@dataclasses.dataclass(slots=True)
class WorkerPlace:
    """Which of how many API workers this is; workers of one server count into a common folder."""

    num_workers: int = 1
    counts_folder: Path | None = None


def make_context(settings: ServeSettings, model_names: tuple[str, ...], place: WorkerPlace) -> ServeContext:
    """Return what the routes share, before there is an engine."""
    context = ServeContext(settings=settings, model_names=model_names, admission=None)
    context.metrics = ServeMetrics(context, folder=place.counts_folder)
    return context


class ApiServer:
    """One API worker. `run` is its life; `stop` may be called from any thread and by a signal."""

    def __init__(
        self,
        settings: ServeSettings,
        host: EngineHost,
        listening: socket.socket,
        *,
        model_names: tuple[str, ...],
        place: WorkerPlace | None = None,
        on_progress: Progress | None = None,
        on_ready: OnReady = lambda info: None,
    ) -> None:
        self._settings = settings
        self._host = host
        self._listening = listening
        self._place = place or WorkerPlace()
        self._on_progress = on_progress
        self._on_ready = on_ready
        self.context = make_context(settings, model_names, self._place)
        self.app = create_app(self.context)
        self._uvicorn = UvicornServer(_uvicorn_config(HostCheck(self.app, settings=settings), settings))
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_stopping = threading.Event()
        self._is_hurried = threading.Event()
        self._change = asyncio.Event()

    def stop(self) -> None:
        """Drain and end; called again, end at once."""
        if self._is_stopping.is_set():
            self._is_hurried.set()
        self._is_stopping.set()
        loop = self._loop
        if loop is not None:
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(self._change.set)

    def run(self) -> int:
        """Serve until the end; returns the exit code. Raises what kept the engine from starting."""
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            return runner.run(self._run())

    async def _run(self) -> int:
        self._loop = asyncio.get_running_loop()
        with _handling_signals(self._loop, self.stop):
            serving = asyncio.ensure_future(self._uvicorn.serve(sockets=[self._listening]))
            # Without anybody who answers there is nothing to live for; `_end` raises why.
            serving.add_done_callback(lambda serving: self.stop())
            try:
                return await self._live()
            finally:
                await self._end(serving)

    async def _live(self) -> int:
        service = await self._load()
        if service is None:
            return 0
        code = await self._serve(service)
        return await self._drain() if code is None else code

    # Loading

    async def _load(self) -> EngineService | None:
        """Start the engine and see it generate; None where a stop came first. Raises why it did not."""
        loop = asyncio.get_running_loop()
        started: asyncio.Future[EngineService] = loop.create_future()
        # A daemon: loading may hang for as long as a disk does, and a stop must not wait for it.
        threading.Thread(target=self._start_engine, args=(loop, started), daemon=True).start()
        service = await self._unless_stopped(started)
        if service is None:
            return None
        self._tell_phase("warming up")
        if await self._unless_stopped(asyncio.ensure_future(_warm_up(service))) is None:
            return None
        settings, info = self._settings, service.info
        self.context.admission = Admission(
            bounds_for(
                max_batch_size=info.max_batch_size * settings.num_engines,
                kv_tokens=info.num_pages * info.tokens_per_block * settings.num_engines,
                max_queued_requests=settings.max_queued_requests,
                max_queued_tokens=settings.max_queued_tokens,
                per_key_share=settings.per_key_share,
                num_keys=len(settings.api_keys),
                num_workers=self._place.num_workers,
            )
        )
        self.context.attach(service)
        self._on_ready(info)
        return service

    def _start_engine(self, loop: asyncio.AbstractEventLoop, started: asyncio.Future[EngineService]) -> None:
        result: Any
        try:
            result, settle = self._host.start(self._show_progress), started.set_result
        except BaseException as error:
            result, settle = error, started.set_exception
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(lambda: None if started.done() else settle(result))

    def _show_progress(self, what: str, share: float) -> None:
        if self._on_progress is not None:
            self._on_progress(what, share)
        self._tell_phase(f"{what}, {share:.0%}" if 0.0 < share < 1.0 else what)

    def _tell_phase(self, phase: str) -> None:
        message = f"The model is still loading ({phase}); try again in a few seconds."
        self.context.refusal = ApiError(503, message, code="loading", headers=RETRY_AFTER)

    async def _unless_stopped(self, future: asyncio.Future[Any]) -> Any:
        """Return a future's result, or None where a stop came first."""
        while not self._is_stopping.is_set():
            change = asyncio.ensure_future(self._change.wait())
            await asyncio.wait((future, change), return_when=asyncio.FIRST_COMPLETED)
            change.cancel()
            if future.done():
                return future.result()
        future.cancel()
        return None

    # Serving

    async def _serve(self, service: EngineService) -> int | None:
        """Watch the engine until a stop (None) or its end (the exit code)."""
        while not self._is_stopping.is_set():
            health = service.health()
            self._follow(health)
            if self._host.has_ended():
                logger.error("%s The server ends.", health.cause or "The engine has stopped.")
                await self._pause(FAILURE_GRACE_S)
                return 1
            await self._pause(WATCH_S)
        return None

    def _follow(self, health: Health) -> None:
        """Take new work only while the engine makes progress."""
        refusal = self.context.refusal
        if health.state not in STATES:
            self.context.refusal = None
        elif refusal is None or refusal.message != cause_of(health):
            logger.error("the engine is %s: %s", health.state, health.cause)
            code = f"engine_{health.state}"
            self.context.refusal = ApiError(503, cause_of(health), code=code, headers=RETRY_AFTER)

    async def _pause(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._change.wait(), seconds)

    # The end

    async def _drain(self) -> int:
        """Refuse new work and wait for what is under way."""
        message = "The server is shutting down; send the request to another one, or try again later."
        self.context.refusal = ApiError(503, message, code=DRAINING, headers=RETRY_AFTER)
        admission = self.context.admission
        assert admission is not None, "it was serving"
        deadline = asyncio.get_running_loop().time() + self._settings.drain_timeout_s
        logger.info("draining: %d requests are under way", admission.num_requests)
        while admission.num_requests and not self._is_hurried.is_set():
            if asyncio.get_running_loop().time() > deadline:
                logger.warning("%d requests did not end in time", admission.num_requests)
                break
            await asyncio.sleep(0.05)
        return 0

    async def _end(self, serving: asyncio.Task[None]) -> None:
        """Stop the engine, which fails what is left, and close the connections."""
        stopping = threading.Thread(target=self._host.stop, daemon=True)
        stopping.start()
        self._uvicorn.force_exit = self._is_hurried.is_set()
        self._uvicorn.should_exit = True
        await serving
        while stopping.is_alive() and not self._is_hurried.is_set():
            await asyncio.sleep(0.02)
        if self.context.metrics is not None:
            self.context.metrics.close()
        self.context.close()


async def _warm_up(service: EngineService) -> bool:
    """See one token come the whole way. Raises EngineError where none does."""
    try:
        output = await asyncio.wait_for(start_probe(service).aresult(), WARM_UP_S)
    except TimeoutError:
        raise EngineError(f"The engine generated no token within {WARM_UP_S:g} s of its start.") from None
    except RequestError as error:
        raise EngineError(f"The engine refused its first request: {error.message}") from None
    if output.error is not None:
        raise EngineError(f"The engine failed at its first request: {output.error.message}")
    return True


def _uvicorn_config(app: Any, settings: ServeSettings) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=guarded_protocol(settings),
        ws="none",
        # How the log looks is the process's choice.
        log_config=None,
        access_log=False,
        lifespan="off",
        server_header=False,
        # A client's word for its own address is nobody's.
        proxy_headers=False,
        timeout_keep_alive=max(1, round(settings.idle_timeout_s)),
        timeout_graceful_shutdown=CLOSE_S,
        ssl_certfile=settings.ssl_certfile,
        ssl_keyfile=settings.ssl_keyfile,
    )


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """Return uvloop's, where it is installed."""
    if sys.platform == "win32":
        return None
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


@contextlib.contextmanager
def _handling_signals(loop: asyncio.AbstractEventLoop, stop: Callable[[], None]) -> Iterator[None]:
    """Let the signals that end a process call `stop`, if this is the thread that may say so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    for number in STOP_SIGNALS:
        signal.signal(number, lambda number, frame: loop.call_soon_threadsafe(stop))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
