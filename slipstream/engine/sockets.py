"""Which sockets join doors to an engine's process, and who can reach them?

Unix sockets in a folder that only this user may enter; where a system has none, ports on the loopback
address. Either way a door shows the secret of whoever started the engine. There are two: one for requests and
events, and one for the heartbeat, which a thread of its own sends.
"""

from __future__ import annotations

import importlib
import os
import secrets
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from slipstream.core.errors import ConfigError, MissingExtraError

if TYPE_CHECKING:
    import zmq

LOOPBACK = "tcp://127.0.0.1"
# Longer ones do not fit into the address of a unix socket (108 bytes on Linux, 104 on macOS).
MAX_PATH_BYTES = 100
# Frames that may wait for a door that does not read, until it is given up.
MAX_WAITING_FRAMES = 20_000
# A frame above this is not even received; those between it and the largest message are counted.
MAX_RECEIVED_BYTES = 64 * 2**20
LINGER_MS = 1000


class Endpoint(msgspec.Struct, frozen=True):
    """Where an engine listens: its address for requests, that of its heartbeat, and the secret."""

    address: str
    heartbeat: str
    secret: str

    def __repr__(self) -> str:
        """Leave the secret out: this may be logged."""
        return f"Endpoint({self.address!r}, {self.heartbeat!r})"


def load_zmq() -> Any:
    """Return pyzmq. Raises MissingExtraError."""
    try:
        return importlib.import_module("zmq")
    except ImportError as error:
        raise MissingExtraError(
            "An engine in a process of its own needs pyzmq; pip install 'slipstream-llm[serve]'."
        ) from error


def has_unix_sockets() -> bool:
    return os.name == "posix" and bool(load_zmq().has("ipc"))


def private_folder() -> Path:
    """Make a folder that only this user may enter."""
    return Path(tempfile.mkdtemp(prefix="slipstream-"))


def make_endpoint(folder: Path | None) -> Endpoint:
    """Return where an engine is to listen: sockets in `folder`, or (None) any free loopback ports.

    Raises ConfigError where the folder's path is too long for a socket or others may enter it.
    """
    secret = secrets.token_hex(32)
    if folder is None:
        return Endpoint(f"{LOOPBACK}:*", f"{LOOPBACK}:*", secret)
    if len(os.fsencode(folder)) > MAX_PATH_BYTES - len("/heartbeat"):
        raise ConfigError(
            f"The folder for sockets has a path of {len(os.fsencode(folder))} bytes, too long for a unix "
            "socket; set TMPDIR to a shorter one."
        )
    if folder.stat().st_mode & 0o077:
        raise ConfigError("Others may enter the folder for sockets; its mode must be 0700.")
    return Endpoint(f"ipc://{folder}/engine", f"ipc://{folder}/heartbeat", secret)


def listen(context: zmq.Context[Any], endpoint: Endpoint) -> tuple[Any, Any, Endpoint]:
    """Bind both sockets; returns (requests, heartbeat, the endpoint with ports filled in)."""
    zmq = load_zmq()
    requests, heartbeat = context.socket(zmq.ROUTER), context.socket(zmq.PUB)
    # Frames for a door that is gone or does not read are errors here, not silently lost.
    requests.setsockopt(zmq.ROUTER_MANDATORY, 1)
    requests.setsockopt(zmq.MAXMSGSIZE, MAX_RECEIVED_BYTES)
    requests.setsockopt(zmq.SNDHWM, MAX_WAITING_FRAMES)
    requests.setsockopt(zmq.RCVHWM, MAX_WAITING_FRAMES)
    requests.setsockopt(zmq.LINGER, LINGER_MS)
    heartbeat.setsockopt(zmq.LINGER, 0)
    heartbeat.setsockopt(zmq.MAXMSGSIZE, 4096)
    addresses: list[str] = []
    for socket, address in ((requests, endpoint.address), (heartbeat, endpoint.heartbeat)):
        socket.bind(address)
        addresses.append(socket.getsockopt_string(zmq.LAST_ENDPOINT))
    return requests, heartbeat, Endpoint(addresses[0], addresses[1], endpoint.secret)


def connect_requests(context: zmq.Context[Any], endpoint: Endpoint) -> Any:
    zmq = load_zmq()
    socket = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.setsockopt(zmq.RCVHWM, 0)
    socket.setsockopt(zmq.LINGER, LINGER_MS)
    socket.connect(endpoint.address)
    return socket


def connect_heartbeat(context: zmq.Context[Any], endpoint: Endpoint) -> Any:
    zmq = load_zmq()
    socket = context.socket(zmq.SUB)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.SUBSCRIBE, b"")
    socket.connect(endpoint.heartbeat)
    return socket
