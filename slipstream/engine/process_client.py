"""How does a door talk to an engine in another process? An `EngineClient` over sockets.

Whoever waits in `events` owns the sockets; other threads leave what they send in an outbox and wake it. An
engine that has ended fails what was asked of it; where it is started again, the client introduces itself anew
and goes on, otherwise `events` raises and the client is done.
Invariant: nothing waits longer for a dead engine than it takes to see that its process is gone.
"""

from __future__ import annotations

import itertools
import socket
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any

from slipstream.core.errors import ConfigError, EngineError
from slipstream.core.outputs import TokenEvent
from slipstream.core.request import Request
from slipstream.engine.client import STOPPED
from slipstream.engine.connection import Connection
from slipstream.engine.engine_info import EngineInfo
from slipstream.engine.health import Health
from slipstream.engine.liveness import LivenessLimits
from slipstream.engine.open_requests import OpenRequests
from slipstream.engine.request_message import RequestMessage, message_of
from slipstream.engine.sockets import Endpoint
from slipstream.engine.step_records import EngineTrace
from slipstream.engine.wire import (
    Abort,
    Ask,
    Down,
    Events,
    Failure,
    Goodbye,
    Message,
    Reply,
    Submit,
    decode_value,
    encode,
    error_from,
)

# How often a client that waits looks at the engine's process.
LOOK_S = 0.25
# An engine answers between two steps; one that does not in this time is not there.
CONNECT_S = 60.0
RETRY_S = 0.5
# A token id takes at most five bytes; lists beside the prompt are allowed for, as far as they are usual.
MAX_TOKENS_PER_FRAME = 1_000_000
IDS_BESIDE_PROMPT = 200


class ProcessClient:
    """A connection to the engine that listens at an endpoint. Raises EngineError where there is none.

    With `awaits_restart` an engine that ended is expected to be started again at the same endpoint.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        limits: LivenessLimits | None = None,
        awaits_restart: bool = False,
        connect_s: float = CONNECT_S,
    ) -> None:
        self._endpoint = endpoint
        self._limits = limits or LivenessLimits()
        self._awaits_restart = awaits_restart
        self._lock = threading.Lock()
        # Held by whoever uses the sockets: `events` while it waits, `close` at the end.
        self._sockets = threading.Lock()
        self._outbox: deque[Message] = deque()
        self._open = OpenRequests()
        self._asked: dict[int, tuple[str, Future[Any]]] = {}
        self._call_ids = itertools.count()
        self._inbox: deque[Down] = deque()
        self._cause = ""
        self._is_closed = False
        # The byte that wakes whoever waits in `events`.
        self._waker, self._wakeful = socket.socketpair()
        self._waker.setblocking(False)
        self._wakeful.setblocking(False)
        self._greeting: Connection | None = None
        self._greeted_s = -RETRY_S
        self._connection: Connection | None = None
        try:
            self._connect(connect_s)
            if self._connection is None:
                raise EngineError("No engine answered; is it running, and of this version?")
        except BaseException:
            self._release()
            raise
        self.info: EngineInfo = self._connection.info

    def submit(self, requests: Sequence[Request]) -> None:
        """Queue requests. Raises EngineError where the engine has stopped, RequestError for callables."""
        messages = [message_of(request) for request in requests]
        with self._lock:
            self._check_open()
            for request in requests:
                self._open.add(request)
            self._outbox += submissions(messages)
        self._wake()

    def abort(self, request_id: str, index: int | None = None) -> None:
        """End a request, or one sample of it. Idempotent; unknown ids are ignored."""
        with self._lock:
            if self._is_closed or request_id not in self._open:
                return
            self._outbox.append(Abort(request_id, index))
        self._wake()

    def command(self, name: str, arguments: Mapping[str, Any]) -> Future[Any]:
        """Run a command of the engine; what it raises is the future's. Raises EngineError once stopped."""
        message = Ask(next(self._call_ids), name, dict(arguments))
        try:
            encode(0, message)
        except TypeError as error:
            raise ConfigError(
                f"The engine's command {name!r} runs in another process: {error}; give a path or plain data."
            ) from None
        future: Future[Any] = Future()
        with self._lock:
            self._check_open()
            self._asked[message.call_id] = (name, future)
            self._outbox.append(message)
        self._wake()
        return future

    def _check_open(self) -> None:
        if self._is_closed:
            raise EngineError(STOPPED)
        if self._connection is None:
            raise EngineError(self._cause)

    def _wake(self) -> None:
        try:
            self._waker.send(b"\0")
        except (BlockingIOError, OSError):
            return  # it is awake already, or nobody waits any more

    def events(self, timeout_s: float) -> list[TokenEvent]:
        deadline = time.monotonic() + timeout_s
        with self._sockets:
            while not self._is_closed:
                try:
                    events = self._advance(max(0.0, deadline - time.monotonic()))
                except EngineError as error:
                    return self._die(str(error))
                if events or time.monotonic() >= deadline:
                    return events
        return []

    def _advance(self, timeout_s: float) -> list[TokenEvent]:
        """Send what waits, and take in what comes within the time."""
        connection = self._connection
        if connection is None:
            self._connect(min(timeout_s, LOOK_S))
            return []
        self._flush(connection)
        if not self._inbox:
            if connection.wait(min(timeout_s, LOOK_S)):
                self._drain_wakes()
                self._flush(connection)
            connection.liveness.look()
            self._inbox += connection.receive()
        events = self._take()
        if not events and not self._inbox and connection.liveness.is_dead:
            raise EngineError("The engine's process has ended.")
        return events

    def _take(self) -> list[TokenEvent]:
        """Take what has come in its order; anything else waits until the events before it are out."""
        events: list[TokenEvent] = []
        while self._inbox:
            if events and not isinstance(self._inbox[0], Events):
                break
            message = self._inbox.popleft()
            match message:
                case Events():
                    events += message.events
                case Reply():
                    self._resolve(message)
                case Failure(cause):
                    self._inbox.clear()
                    raise EngineError(cause)
                case _:
                    raise EngineError("The engine sent what it should not; it is not trusted further.")
        if events:
            with self._lock:
                self._open.see(events)
        return events

    def _resolve(self, reply: Reply) -> None:
        with self._lock:
            name, future = self._asked.pop(reply.call_id, ("", None))
        if future is None or not future.set_running_or_notify_cancel():
            return
        if reply.error is not None:
            future.set_exception(error_from(reply.error))
        else:
            future.set_result(own_value(decode_value(name, reply.value)))

    def _flush(self, connection: Connection) -> None:
        while self._outbox:
            with self._lock:
                message = self._outbox.popleft() if self._outbox else None
            if message is not None:
                connection.send(message)

    def _drain_wakes(self) -> None:
        try:
            while self._wakeful.recv(4096):
                pass
        except BlockingIOError:
            return

    def _die(self, cause: str) -> list[TokenEvent]:
        """Fail everything that was asked of an engine that is gone; raise where no other comes."""
        with self._lock:
            connection, self._connection = self._connection, None
            self._cause = cause
            events = self._open.fail(cause)
            asked, self._asked = self._asked, {}
            self._outbox.clear()
            self._inbox.clear()
        self._drop_greeting()
        if connection is not None:
            connection.close(is_lost=True)
        for _, future in asked.values():
            if future.set_running_or_notify_cancel():
                future.set_exception(EngineError(cause))
        if not self._awaits_restart:
            raise EngineError(cause)
        return events

    def _connect(self, timeout_s: float) -> None:
        """Go on greeting for a while; begin anew where nobody answers for long."""
        now = time.monotonic()
        if self._greeting is None and now - self._greeted_s < RETRY_S:
            # It was turned away just now.
            time.sleep(min(timeout_s, RETRY_S))
            return
        if self._greeting is None or now - self._greeted_s > CONNECT_S:
            self._drop_greeting()
            self._greeting, self._greeted_s = Connection(self._endpoint, self._limits, self._wakeful), now
        if not self._greeting.greet(timeout_s):
            return
        with self._lock:
            self._connection, self._greeting = self._greeting, None
            self.info = self._connection.info

    def _drop_greeting(self) -> None:
        greeting, self._greeting = self._greeting, None
        if greeting is not None:
            greeting.close(is_lost=True)

    def last_stats(self) -> dict[str, Any]:
        connection = self._connection
        beat = None if connection is None else connection.liveness.beat
        if beat is None:
            return {}
        return {**beat.counters, "num_running": beat.num_running, "num_waiting": beat.num_waiting}

    def health(self) -> Health:
        connection = self._connection
        if self._is_closed:
            return Health("stopped", STOPPED)
        if connection is None:
            return Health("stopped", self._cause)
        return connection.liveness.health()

    def close(self) -> None:
        """Leave the engine, which ends what was asked of it; a waiting `events` returns. Idempotent."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
            asked, self._asked = self._asked, {}
        for _, future in asked.values():
            if future.set_running_or_notify_cancel():
                future.set_exception(EngineError(STOPPED))
        self._wake()
        with self._sockets:
            connection, self._connection = self._connection, None
            if connection is not None:
                connection.send(Goodbye())
                connection.close()
            self._release()

    def _release(self) -> None:
        self._drop_greeting()
        self._waker.close()
        self._wakeful.close()


def submissions(messages: Sequence[RequestMessage]) -> list[Submit]:
    """Put requests into messages that stay far below the largest frame; one alone always does."""
    batches: list[list[RequestMessage]] = [[]]
    num_tokens = 0
    for message in messages:
        size = len(message.prompt_token_ids) + IDS_BESIDE_PROMPT
        if num_tokens + size > MAX_TOKENS_PER_FRAME and batches[-1]:
            batches.append([])
            num_tokens = 0
        batches[-1].append(message)
        num_tokens += size
    return [Submit(batch) for batch in batches if batch]


def own_value(value: Any) -> Any:
    """Return what a command returned with the request ids that doors gave: a trace is of all of them."""
    if isinstance(value, EngineTrace):
        for event in value.events:
            event.request_id = event.request_id.partition(".")[2]
    return value
