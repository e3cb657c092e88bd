"""What do a server's supervisor and its API workers say to each other over pipes? One JSON message a line.

The pipes join a parent to a child that it started, so neither side is untrusted; still, nothing of it can
become code.
"""

from __future__ import annotations

import msgspec

from slipstream.engine.sockets import Endpoint
from slipstream.serve.settings import ServeSettings


class WorkerOrder(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker is to be: it accepts at the socket `listening_fd`, which it has from its parent."""

    settings: ServeSettings
    listening_fd: int
    num_workers: int
    counts_folder: str
    parent_pid: int


class Loading(msgspec.Struct, tag=True, frozen=True):
    """How far the engines are."""

    what: str
    share: float


class EnginesReady(msgspec.Struct, tag=True, frozen=True):
    endpoints: list[Endpoint]


News = Loading | EnginesReady
# What a worker says, once, when it takes requests.
WORKER_READY = b"ready\n"
