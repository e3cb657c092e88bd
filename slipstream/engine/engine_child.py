"""What does an engine's process do, from its first line to its last? It speaks both pipes to its parent.

On standard input comes one line, the order; after that the pipe only says by closing that the parent is gone,
or by a word that the engine is to drain or stop. On standard output go progress, then readiness or the reason
why not. Whatever a library prints goes to standard error.
Invariant: it says it is ready only after the engine has generated a token; it never outlives its parent.
"""

from __future__ import annotations

import ctypes
import dataclasses
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import IO, Any

import msgspec

from slipstream.core.collector import freeze_collector
from slipstream.core.errors import SlipstreamError
from slipstream.core.log_lines import write_log
from slipstream.core.request import Request
from slipstream.core.sampling_params import SamplingParams
from slipstream.engine.client import InProcessClient
from slipstream.engine.config import EngineConfig
from slipstream.engine.config_message import read_config
from slipstream.engine.engine_info import EngineInfo, info_of
from slipstream.engine.engine_server import EngineServer
from slipstream.engine.process_orders import Failed, Order, Progressed, Ready, Status
from slipstream.engine.scheduler_stats import SchedulerStats
from slipstream.engine.wire import error_parts

logger = logging.getLogger(__name__)

PR_SET_PDEATHSIG = 1
WARM_UP_STEPS = 1000


@dataclasses.dataclass(frozen=True, slots=True)
class ServedEngine:
    """An engine ready to serve."""

    client: InProcessClient
    info: EngineInfo


# Called with (what is being done, share done so far from 0 to 1).
Progress = Callable[[str, float], None]
MakeEngine = Callable[[EngineConfig, Progress], ServedEngine]


def make_engine(config: EngineConfig, progress: Progress) -> ServedEngine:
    """Load the model of a configuration and see it generate a token."""
    from slipstream.engine.assembly import assemble
    from slipstream.engine.control import EngineControl

    assembly = assemble(config, progress=progress)
    client = InProcessClient(assembly.engine, EngineControl(assembly, config).commands())
    info = info_of(assembly, config)
    progress("warming up", 1.0)
    warm_up(client, info)
    return ServedEngine(client, info)


def warm_up(client: InProcessClient, info: EngineInfo) -> None:
    """Generate one token and leave no trace of it. Raises RuntimeError where none comes."""
    params = SamplingParams(max_tokens=1, ignore_eos=True, detokenize=False)
    client.submit([Request.create([0], params, info.limits, request_id="warm-up")])
    for _ in range(WARM_UP_STEPS):
        for event in client.events(0.0):
            if event.error is not None:
                raise RuntimeError(f"the first token failed: {event.error[0]}")
            if event.new_token_ids:
                scheduler = client.engine.scheduler
                scheduler.cache.reset_prefix_cache()
                scheduler.stats = SchedulerStats()
                scheduler.records.clear()
                client.num_steps = 0
                return
    raise RuntimeError("the engine generates no token")


def run_engine_process(make: MakeEngine = make_engine) -> int:
    """Be the engine's process: take the order, make the engine, serve it. Returns the exit status."""
    status = Pipe(_claim_stdout())
    # Unbuffered: a thread that waits in a buffered read would hold its lock while the interpreter ends.
    orders = os.fdopen(os.dup(0), "rb", buffering=0)
    order = msgspec.json.decode(orders.readline(), type=Order)
    _die_with(order.parent_pid)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    write_log(as_json=order.log_json)
    parent = Parent(orders)
    try:
        served = make(read_config(order.config), status.progress)
        server = EngineServer(served.client, served.info, order.endpoint)
    except BaseException as error:
        status.write(Failed(*_reason(error)))
        if not isinstance(error, SlipstreamError):
            logger.exception("the engine did not start")
        return 1
    parent.watch(server)
    freeze_collector()
    status.write(Ready(server.endpoint, served.info))
    server.run()
    return 0


def _reason(error: BaseException) -> tuple[str, str]:
    if isinstance(error, SlipstreamError):
        return error_parts(error)
    return "EngineError", f"The engine did not start: {type(error).__name__}: {error}"


def _claim_stdout() -> IO[bytes]:
    """Keep standard output for the parent; what anything else prints goes to standard error."""
    sys.stdout.flush()
    own = os.dup(1)
    os.dup2(2, 1)
    return os.fdopen(own, "wb", buffering=0)


def _die_with(parent_pid: int) -> None:
    """Ask the system to end this process with its parent, where it can; the pipe does so everywhere."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.name == "posix" and os.getppid() != parent_pid:
        os._exit(1)


class Pipe:
    """What the parent reads: one JSON message a line."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._last_s = 0.0

    def write(self, message: Status) -> None:
        self._file.write(msgspec.json.encode(message) + b"\n")

    def progress(self, what: str, share: float) -> None:
        """Tell how far loading is, a few times a second."""
        now = time.monotonic()
        if now - self._last_s > 0.1 or share >= 1.0:
            self._last_s = now
            self.write(Progressed(what, share))


class Parent:
    """Listens to the parent on standard input, by a thread, from before the engine is loaded."""

    def __init__(self, orders: IO[bytes]) -> None:
        self._orders = orders
        self._server: EngineServer | None = None
        signal.signal(signal.SIGTERM, self._on_term)
        threading.Thread(target=self._listen, name="slipstream-parent", daemon=True).start()

    def watch(self, server: EngineServer) -> None:
        self._server = server

    def _on_term(self, number: int, frame: Any) -> None:
        """Drain; an engine that is still loading ends at once."""
        if self._server is None:
            os._exit(1)
        self._server.drain()

    def _listen(self) -> None:
        for line in iter(self._orders.readline, b""):
            word, server = line.strip(), self._server
            if server is None:
                # What loads is not worth waiting for.
                os._exit(1)
            if word == b"drain":
                server.drain()
            elif word == b"stop":
                server.stop()
        # Nobody is left to serve, and nobody to tell.
        os._exit(1)


if __name__ == "__main__":
    sys.exit(run_engine_process())
