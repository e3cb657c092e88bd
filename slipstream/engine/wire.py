"""What crosses between a door and an engine in another process, and in which bytes?

A frame is a header (magic, protocol version, sequence number) and one msgpack message of a closed set.
Nothing in it can become code: messages are decoded into declared types, arrays into one of a few types.
Invariant: whatever cannot be read raises `WireError`, whose words hold nothing of the frame's contents.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import Any, cast

import msgspec
import numpy as np
from numpy.typing import NDArray

from slipstream.core.errors import (
    CheckpointError,
    ConfigError,
    EngineError,
    OutOfMemoryError,
    RequestError,
    SlipstreamError,
    UnsupportedError,
)
from slipstream.core.outputs import TokenEvent
from slipstream.core.plan import TokenLogprobs
from slipstream.engine.engine_info import EngineInfo
from slipstream.engine.request_message import RequestMessage
from slipstream.engine.step_records import EngineTrace

PROTOCOL_VERSION = 1
MAGIC = b"SLIP"
HEADER = struct.Struct("<4sHQ")
# The longest prompts take a few megabytes; a door that sends more is broken.
MAX_FRAME_BYTES = 16 * 2**20
ARRAY_CODE = 1
ARRAY_TYPES = ("float32", "float16", "int64", "int32")
_ARRAY_HEADER = struct.Struct("<BB")

# Errors that cross by name; another becomes an EngineError.
ERRORS: dict[str, type[SlipstreamError]] = {
    cls.__name__: cls
    for cls in (
        CheckpointError,
        ConfigError,
        EngineError,
        OutOfMemoryError,
        UnsupportedError,
    )
}
# What commands return, where it is not plain data.
REPLY_TYPES: dict[str, Any] = {"trace": EngineTrace}


class WireError(Exception):
    """A frame that is not one of this protocol."""


class Message(msgspec.Struct, tag=True, frozen=True):
    """Base of all messages."""


class Hello(Message, frozen=True):
    """A door introduces itself; `secret` is the one that whoever started the engine was given."""

    secret: str
    version: str
    pid: int


class Submit(Message, frozen=True):
    requests: list[RequestMessage]


class Abort(Message, frozen=True):
    request_id: str
    index: int | None = None


class Ask(Message, frozen=True):
    """Run a command by name; its `Reply` carries the same `call_id`."""

    call_id: int
    name: str
    arguments: dict[str, Any]


class Goodbye(Message, frozen=True):
    """A door leaves; its requests end."""


class Welcome(Message, frozen=True):
    """The engine's answer to `Hello`: its facts, its process, and what it puts before request ids."""

    info: EngineInfo
    pid: int
    prefix: str


class Events(Message, frozen=True):
    """What one step brought to one door."""

    events: list[TokenEvent]


class Reply(Message, frozen=True):
    """What a command returned, encoded by itself, or (class, message) of what it raised."""

    call_id: int
    value: bytes = b""
    error: tuple[str, str] | None = None


class Failure(Message, frozen=True):
    """The engine serves this door no more."""

    cause: str


class Heartbeat(Message, frozen=True):
    """Sent to all doors at a steady beat, from a thread that a hung step does not hold up.

    `stalled_s` is how long the step or command of now has taken; `time_s` is on the monotonic clock;
    `counters` are the engine's statistics, as they were a moment ago.
    """

    num_steps: int
    num_running: int
    num_waiting: int
    stalled_s: float
    time_s: float
    refusal: str = ""
    counters: dict[str, int | float] = {}


Up = Hello | Submit | Abort | Ask | Goodbye
Down = Welcome | Events | Reply | Failure | Heartbeat


def _pack_array(value: object) -> msgspec.msgpack.Ext:
    if not isinstance(value, np.ndarray):
        raise TypeError(f"{type(value).__name__} does not cross to another process")
    array = cast(NDArray[Any], value)
    shape = struct.pack(f"<{array.ndim}Q", *array.shape)
    head = _ARRAY_HEADER.pack(ARRAY_TYPES.index(array.dtype.name), array.ndim)
    return msgspec.msgpack.Ext(ARRAY_CODE, head + shape + array.tobytes())


def _unpack_array(code: int, data: memoryview) -> Any:
    """Return an array of its own memory. Raises ValueError where sizes do not fit."""
    if code != ARRAY_CODE or len(data) < _ARRAY_HEADER.size:
        raise ValueError("no array")
    head: tuple[int, int] = _ARRAY_HEADER.unpack_from(data)
    kind, num_dims = head
    start = _ARRAY_HEADER.size + 8 * num_dims
    if kind >= len(ARRAY_TYPES) or len(data) < start:
        raise ValueError("a malformed array")
    shape = struct.unpack_from(f"<{num_dims}Q", data, _ARRAY_HEADER.size)
    name: str = ARRAY_TYPES[kind]
    if math.prod(shape) * np.dtype(name).itemsize != len(data) - start:
        raise ValueError("an array of another size")
    return np.frombuffer(data[start:], dtype=name).reshape(shape).copy()


_encoder = msgspec.msgpack.Encoder(enc_hook=_pack_array)
_up_decoder = msgspec.msgpack.Decoder(Up)
_down_decoder = msgspec.msgpack.Decoder(Down, ext_hook=_unpack_array)


def encode(sequence: int, message: Message) -> bytearray:
    """Return the frame of a message."""
    frame = bytearray(HEADER.size)
    HEADER.pack_into(frame, 0, MAGIC, PROTOCOL_VERSION, sequence)
    _encoder.encode_into(message, frame, HEADER.size)
    return frame


def decode_up(frame: bytes) -> tuple[int, Up]:
    """Return (sequence number, message) of what a door sent. Raises WireError."""
    if len(frame) > MAX_FRAME_BYTES:
        raise WireError("it is larger than any message")
    return _decode(frame, _up_decoder)


def decode_down(frame: bytes) -> tuple[int, Down]:
    """Return (sequence number, message) of what the engine sent. Raises WireError."""
    return _decode(frame, _down_decoder)


def _decode(frame: bytes, decoder: msgspec.msgpack.Decoder[Any]) -> tuple[int, Any]:
    if len(frame) < HEADER.size:
        raise WireError("it is shorter than a header")
    magic, version, sequence = HEADER.unpack_from(frame)
    if magic != MAGIC:
        raise WireError("it is none of this protocol")
    if version != PROTOCOL_VERSION:
        raise WireError(f"it is of another version than {PROTOCOL_VERSION} of the protocol")
    try:
        return sequence, decoder.decode(memoryview(frame)[HEADER.size :])
    except (msgspec.MsgspecError, ValueError, RecursionError):
        # Their words may quote the frame.
        raise WireError("its message cannot be read") from None


def own_events(events: Sequence[TokenEvent], prefix: str) -> None:
    """Give events the request ids of the door that they are for, and extras the types they left with."""
    length = len(prefix)
    for event in events:
        event.request_id = event.request_id[length:]
        if event.extras:
            event.extras = [_typed_extra(*extra) for extra in event.extras]


def _typed_extra(what: str, start: int, values: Any) -> tuple[str, int, Any]:
    if isinstance(values, list):
        values = msgspec.convert(values, list[TokenLogprobs])
    return what, start, values


def encode_value(value: object) -> bytes:
    """Return what a command returned, encoded. Raises EngineError for what is not plain data."""
    try:
        return _encoder.encode(value)
    except (TypeError, ValueError, OverflowError):
        raise EngineError(
            f"What the command returned ({type(value).__name__}) does not cross processes."
        ) from None


def decode_value(command: str, value: bytes) -> Any:
    """Return what a command returned, of the type that it returned it in."""
    return msgspec.msgpack.decode(value, type=REPLY_TYPES.get(command, Any), ext_hook=_unpack_array)


def error_parts(error: BaseException) -> tuple[str, str]:
    """Return (class, message) of an error; of one that nobody meant to raise only its class."""
    if isinstance(error, RequestError):
        return "EngineError", error.message
    if isinstance(error, SlipstreamError):
        return type(error).__name__, str(error)
    return "EngineError", f"The engine's process raised {type(error).__name__}."


def error_from(parts: tuple[str, str]) -> SlipstreamError:
    kind, message = parts
    return ERRORS.get(kind, EngineError)(message)
