"""How does an engine in its own process serve its doors? One loop: take frames, step, send what came of it.

The thread that steps the engine also owns the socket, so nothing is handed from thread to thread; one frame
per door and step carries all its events. A door is trusted from a valid `Hello` to its first frame that is
malformed, replayed or out of order: then its requests end, and it is not heard again.
Invariant: a door that leaves, dies or does not read has its requests aborted; request ids are its own.
"""

from __future__ import annotations

import dataclasses
import hmac
import itertools
import logging
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import psutil

from slipstream import __version__
from slipstream.core.errors import RequestError, SlipstreamError
from slipstream.core.outputs import TokenEvent
from slipstream.core.request import Request
from slipstream.engine.client import QUIET_S, InProcessClient, refusal
from slipstream.engine.engine_info import EngineInfo
from slipstream.engine.liveness import is_alive, process_of
from slipstream.engine.request_message import RequestMessage, read_request
from slipstream.engine.sockets import Endpoint, listen, load_zmq
from slipstream.engine.wire import (
    Abort,
    Ask,
    Down,
    Events,
    Failure,
    Goodbye,
    Heartbeat,
    Hello,
    Reply,
    Submit,
    Up,
    Welcome,
    WireError,
    decode_up,
    encode,
    encode_value,
    error_parts,
)

logger = logging.getLogger(__name__)

HEARTBEAT_S = 0.5
IDLE_POLL_MS = 250
# A flood of frames delays a step by no more than these take.
MAX_FRAMES_PER_STEP = 256
MAX_REMEMBERED = 1024
DRAINING = "The server is shutting down and takes no further requests."


@dataclasses.dataclass(slots=True, eq=False)
class Peer:
    """A door that said Hello. `open` counts the samples of each of its requests that have not ended."""

    identity: bytes
    prefix: str
    process: psutil.Process | None
    next_in: int
    next_out: int = 0
    open: dict[str, int] = dataclasses.field(default_factory=dict[str, int])


class EngineServer:
    """Serves one engine on one endpoint, by the thread that calls `run`."""

    def __init__(self, client: InProcessClient, info: EngineInfo, endpoint: Endpoint) -> None:
        self._zmq = load_zmq()
        self._client = client
        self._info = info
        self._context = self._zmq.Context()
        self._socket, heartbeat, self.endpoint = listen(self._context, endpoint)
        # A byte in it wakes the loop.
        self._waker, self._wakeful = socket.socketpair()
        self._poller = self._zmq.Poller()
        self._poller.register(self._socket, self._zmq.POLLIN)
        self._poller.register(self._wakeful, self._zmq.POLLIN)
        self._peers: dict[bytes, Peer] = {}
        self._owners: dict[str, Peer] = {}
        # Doors that left may have frames under way; those that are distrusted are not heard again.
        self._left: dict[bytes, None] = {}
        self._distrusted: dict[bytes, None] = {}
        self._numbers = itertools.count()
        self._replies: list[tuple[Peer, Ask, Future[Any]]] = []
        self._heart = Heart(client, heartbeat, self._processes, lambda: self.num_dropped_frames)
        # Whether the quiet before this moment was used, and so has lasted.
        self._is_preparing = False
        self._is_draining = False
        self._is_stopping = False
        self.num_dropped_frames = 0

    def _processes(self) -> list[tuple[bytes, psutil.Process]]:
        """The processes of doors; read by the heart's thread."""
        return [(peer.identity, peer.process) for peer in list(self._peers.values()) if peer.process]

    def drain(self) -> None:
        """Take no further requests and end once nothing runs. From any thread while it runs."""
        self._is_draining = True
        self._waker.send(b"\0")

    def stop(self) -> None:
        """End after the present step. From any thread while it runs."""
        self._is_stopping = True
        self._waker.send(b"\0")

    def run(self) -> None:
        """Serve until `stop`, or `drain` and nothing runs. What the engine raises fails every door."""
        cause = "The engine is shut down."
        self._heart.start()
        try:
            while not self._is_stopping and not (self._is_draining and self._client.is_idle):
                self._advance()
        except Exception as error:
            cause = f"The engine stopped: {type(error).__name__}."
            raise
        finally:
            self._close(cause)

    def _close(self, cause: str) -> None:
        self._heart.stop()
        for peer in list(self._peers.values()):
            self._send(peer, Failure(cause))
        self._client.close()
        self._socket.close()
        self._context.term()
        self._waker.close()
        self._wakeful.close()

    def _advance(self) -> None:
        self._receive()
        while self._heart.gone:
            self._lose(self._heart.gone.popleft(), "its process ended")
        if self._client.is_idle and not self._replies:
            self._is_preparing = self._client.use_quiet()
            return
        self._is_preparing = False
        events = self._client.events(0.0)
        # A command saw the engine before this step, so its reply goes first.
        for asked in [asked for asked in self._replies if asked[2].done()]:
            self._replies.remove(asked)
            self._reply(*asked)
        self._send_events(events)

    def _receive(self) -> None:
        """Take what has arrived; waits for it while the engine has nothing to do."""
        zmq, requests = self._zmq, self._socket
        if self._client.is_idle:
            ready = dict(self._poller.poll(self._quiet_ms()))
            if requests not in ready:
                return
        elif not requests.getsockopt(zmq.EVENTS) & zmq.POLLIN:
            return
        for _ in range(MAX_FRAMES_PER_STEP):
            try:
                identity, *frames = requests.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                self._take(identity, frames)
            except WireError as error:
                self._distrust(identity, str(error))

    def _quiet_ms(self) -> int:
        """Return how long to wait for frames before the time is used; once it is, no longer."""
        if not self._client.engine.can_prepare:
            return IDLE_POLL_MS
        return 0 if self._is_preparing else int(1e3 * QUIET_S)

    def _take(self, identity: bytes, frames: Sequence[bytes]) -> None:
        if identity in self._left:
            return
        if identity in self._distrusted:
            self.num_dropped_frames += 1
            return
        if len(frames) != 1:
            raise WireError("it has parts")
        sequence, message = decode_up(frames[0])
        peer = self._peers.get(identity)
        if peer is None:
            self._greet(identity, sequence, message)
            return
        if sequence != peer.next_in:
            raise WireError("it is replayed or out of order")
        peer.next_in += 1
        match message:
            case Submit(requests):
                for request in requests:
                    self._submit(peer, request)
            case Abort(request_id, index):
                self._client.abort(peer.prefix + request_id, index)
            case Ask():
                self._ask(peer, message)
            case Goodbye():
                self._lose(identity, "it left")
            case Hello():
                raise WireError("it is a second greeting")

    def _greet(self, identity: bytes, sequence: int, message: Up) -> None:
        if not isinstance(message, Hello):
            raise WireError("it comes before a greeting")
        if not hmac.compare_digest(message.secret.encode(), self.endpoint.secret.encode()):
            raise WireError("its secret is wrong")
        peer = Peer(identity, f"{next(self._numbers)}.", process_of(message.pid), sequence + 1)
        if message.version != __version__:
            self._send(peer, Failure(f"The engine is version {__version__}, its door is not; restart both."))
            return
        self._peers[identity] = peer
        self._send(peer, Welcome(self._info, os.getpid(), peer.prefix))

    def _submit(self, peer: Peer, message: RequestMessage) -> None:
        if peer.prefix + message.request_id in self._owners:
            raise WireError("it uses the id of a request that runs")
        try:
            if self._is_draining:
                raise RequestError(DRAINING, code="engine_stopped")
            request = read_request(message, self._info.limits, prefix=peer.prefix, now_s=time.monotonic())
        except RequestError as error:
            # As many answers as the door may wait for, and no more than the engine would ever give.
            count = min(max(message.num_samples, 1), self._info.limits.max_n)
            events = [refusal(peer.prefix + message.request_id[:256], i, error) for i in range(count)]
            self._send(peer, Events(events))
            return
        self._open(peer, request)
        self._client.submit([request])

    def _open(self, peer: Peer, request: Request) -> None:
        peer.open[request.request_id] = request.num_samples
        self._owners[request.request_id] = peer

    def _ask(self, peer: Peer, ask: Ask) -> None:
        try:
            future = self._client.command(ask.name, ask.arguments)
        except SlipstreamError as error:
            future = Future[Any]()
            future.set_exception(error)
        self._replies.append((peer, ask, future))

    def _reply(self, peer: Peer, ask: Ask, future: Future[Any]) -> None:
        try:
            value = future.result()
            if ask.name == "stats":
                counts = {"num_dropped_frames": self.num_dropped_frames, "num_doors": len(self._peers)}
                value = {**value, **counts}
            reply = Reply(ask.call_id, encode_value(value))
        except Exception as error:
            logger.info("the command %.40s failed: %s", ask.name, error)
            reply = Reply(ask.call_id, error=error_parts(error))
        if peer.identity in self._peers:
            self._send(peer, reply)

    def _send_events(self, events: Sequence[TokenEvent]) -> None:
        batches: dict[Peer, list[TokenEvent]] = {}
        owners = self._owners
        for event in events:
            peer = owners.get(event.request_id)
            if peer is None:
                continue
            batch = batches.get(peer)
            if batch is None:
                batch = batches[peer] = []
            batch.append(event)
            if event.finish_reason is not None:
                self._close_sample(peer, event.request_id)
        for peer, batch in batches.items():
            self._send(peer, Events(batch))

    def _close_sample(self, peer: Peer, request_id: str) -> None:
        peer.open[request_id] -= 1
        if not peer.open[request_id]:
            del peer.open[request_id], self._owners[request_id]

    def _send(self, peer: Peer, message: Down) -> None:
        zmq = self._zmq
        frame = encode(peer.next_out, message)
        peer.next_out += 1
        try:
            self._socket.send_multipart([peer.identity, frame], zmq.NOBLOCK)
        except zmq.Again:
            self._lose(peer.identity, "it does not read")
        except zmq.ZMQError:
            self._lose(peer.identity, "it cannot be reached")

    def _lose(self, identity: bytes, why: str) -> None:
        """Forget a door and abort what it asked for."""
        peer = self._peers.pop(identity, None)
        if peer is None:
            return
        logger.info("door %s is gone: %s", peer.prefix, why)
        for request_id in peer.open:
            del self._owners[request_id]
            self._client.abort(request_id)
        remember(self._left, identity)

    def _distrust(self, identity: bytes, why: str) -> None:
        self.num_dropped_frames += 1
        logger.warning("dropped a frame, and whoever sent it: %s", why)
        peer = self._peers.get(identity)
        if peer is not None:
            self._send(peer, Failure("The engine does not trust what it got from this door."))
            self._lose(identity, "its frames cannot be trusted")
            self._left.pop(identity, None)
        remember(self._distrusted, identity)


def remember(identities: dict[bytes, None], identity: bytes) -> None:
    """Add one, and forget the oldest where there are too many."""
    if len(identities) >= MAX_REMEMBERED:
        del identities[next(iter(identities))]
    identities[identity] = None


class Heart:
    """The thread that says every `HEARTBEAT_S` how far the engine is, whatever the engine does meanwhile.

    It also looks after the doors' processes; `gone` are the identities of those that ended.
    """

    def __init__(
        self,
        client: InProcessClient,
        socket: Any,
        processes: Callable[[], list[tuple[bytes, psutil.Process]]],
        num_dropped_frames: Callable[[], int],
    ) -> None:
        self.gone: deque[bytes] = deque()
        self._client = client
        self._socket = socket
        self._processes = processes
        self._num_dropped_frames = num_dropped_frames
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="slipstream-heartbeat", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()
        self._socket.close()

    def _run(self) -> None:
        for sequence in itertools.count():
            self._socket.send(encode(sequence, self._beat()))
            self.gone += [identity for identity, process in self._processes() if not is_alive(process)]
            if self._stopping.wait(HEARTBEAT_S):
                return

    def _beat(self) -> Heartbeat:
        client, scheduler = self._client, self._client.engine.scheduler
        refused = client.engine.refusal
        return Heartbeat(
            num_steps=client.num_steps,
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            stalled_s=client.stalled_s,
            time_s=time.monotonic(),
            refusal="" if refused is None else refused.message,
            counters=self._counters(),
        )

    def _counters(self) -> dict[str, int | float]:
        """Look at what the engine's own thread counts; each is a number of its own, so no lock is needed."""
        try:
            stats = self._client.last_stats()
        except Exception:
            # Something changed while it was looked at. The heart beats on, or the engine counts as dead.
            logger.debug("no counters with this heartbeat", exc_info=True)
            stats = {}
        counters = {name: value for name, value in stats.items() if isinstance(value, int | float)}
        return counters | {"num_dropped_frames": self._num_dropped_frames()}
