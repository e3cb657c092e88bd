"""What do an engine's process and its parent say to each other over pipes? One JSON message a line."""

from __future__ import annotations

from typing import Any

import msgspec

from slipstream.engine.engine_info import EngineInfo
from slipstream.engine.sockets import Endpoint


class Order(msgspec.Struct, frozen=True):
    """What to run, where to listen and how to log; `config` is an `engine.config_message`."""

    config: dict[str, Any]
    endpoint: Endpoint
    parent_pid: int
    log_json: bool = False


class Progressed(msgspec.Struct, frozen=True, tag=True):
    """What is being done, and the share of it done so far from 0 to 1."""

    what: str
    share: float


class Ready(msgspec.Struct, frozen=True, tag=True):
    endpoint: Endpoint
    info: EngineInfo


class Failed(msgspec.Struct, frozen=True, tag=True):
    """The engine did not start; `kind` is the class of the error."""

    kind: str
    message: str


Status = Progressed | Ready | Failed
