"""What is one door's connection to one engine's process? Sockets, sequence numbers, and the engine's pulse.

All of it belongs to one thread. Invariant: messages come out whole and in the order they were sent, or an
EngineError does.
"""

from __future__ import annotations

import os
import socket

from slipstream import __version__
from slipstream.core.errors import EngineError
from slipstream.engine.engine_info import EngineInfo
from slipstream.engine.liveness import Liveness, LivenessLimits
from slipstream.engine.sockets import Endpoint, connect_requests, load_zmq
from slipstream.engine.wire import (
    Down,
    Events,
    Failure,
    Hello,
    Message,
    Welcome,
    WireError,
    decode_down,
    encode,
    own_events,
)


class Connection:
    """A greeting under way, and after `greet` says so a connection. `wakeful` wakes whoever is in `wait`."""

    liveness: Liveness
    info: EngineInfo

    def __init__(self, endpoint: Endpoint, limits: LivenessLimits, wakeful: socket.socket) -> None:
        self._zmq = load_zmq()
        self._endpoint = endpoint
        self._limits = limits
        self._context = self._zmq.Context()
        self._socket = connect_requests(self._context, endpoint)
        self._poller = self._zmq.Poller()
        self._poller.register(self._socket, self._zmq.POLLIN)
        self._poller.register(wakeful, self._zmq.POLLIN)
        self._wakeful_fd = wakeful.fileno()
        self._next_out = 0
        self._next_in = 0
        self._prefix = ""
        self._is_greeted = False
        self.send(Hello(endpoint.secret, __version__, os.getpid()))

    def greet(self, timeout_s: float) -> bool:
        """Wait for the engine's answer; False where none came yet. Raises EngineError for a refusal."""
        if not self._socket.poll(timeout_s * 1000):
            return False
        for message in self.receive():
            if isinstance(message, Failure):
                raise EngineError(message.cause)
            if not isinstance(message, Welcome):
                raise EngineError("The engine did not answer as one of this version does.")
            self.liveness = Liveness(self._endpoint, message.pid, self._limits)
            self._poller.register(self.liveness.socket, self._zmq.POLLIN)
            self._prefix = message.prefix
            self.info = message.info
            self._is_greeted = True
        return self._is_greeted

    def send(self, message: Message) -> None:
        self._socket.send(encode(self._next_out, message))
        self._next_out += 1

    def wait(self, timeout_s: float) -> bool:
        """Wait until something has come; True where another thread has something to send."""
        ready = dict(self._poller.poll(timeout_s * 1000))
        if self.liveness.socket in ready:
            self.liveness.take()
        return self._wakeful_fd in ready

    def receive(self) -> list[Down]:
        """Return the messages that have come. Raises EngineError where one is missing or not understood."""
        messages: list[Down] = []
        while True:
            try:
                frame = self._socket.recv(self._zmq.NOBLOCK)
            except self._zmq.Again:
                return messages
            try:
                sequence, message = decode_down(frame)
            except WireError as error:
                raise EngineError(f"A frame of the engine cannot be read: {error}.") from None
            if sequence != self._next_in:
                raise EngineError("Frames of the engine were lost.")
            self._next_in += 1
            if isinstance(message, Events):
                own_events(message.events, self._prefix)
            messages.append(message)

    def close(self, *, is_lost: bool = False) -> None:
        """Close the sockets; what was sent is delivered first, unless nobody is left to take it."""
        self._socket.close(linger=0 if is_lost else None)
        if self._is_greeted:
            self.liveness.close()
        self._context.term()
