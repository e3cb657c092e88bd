"""Does every message come out as it went in, and is anything else refused without quoting it?"""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest

from slipstream.core.errors import CheckpointError, ConfigError, EngineError, RequestError, UnsupportedError
from slipstream.core.outputs import TokenEvent
from slipstream.core.plan import TokenLogprobs
from slipstream.engine import wire
from slipstream.engine.wire import (
    Abort,
    Ask,
    Events,
    Failure,
    Goodbye,
    Heartbeat,
    Hello,
    Reply,
    Submit,
    Welcome,
    WireError,
    decode_down,
    decode_up,
    decode_value,
    encode,
    encode_value,
    error_from,
    error_parts,
    own_events,
)
from tests.engine.served import INFO

UP = [
    Hello("secret", "1.0", 12),
    Submit([]),
    Abort("r", None),
    Abort("r", 3),
    Ask(5, "sleep", {"level": 1, "nested": {"a": [1, "x", None, 2.5]}}),
    Goodbye(),
]
DOWN = [
    Welcome(INFO, 12, "0."),
    Events([TokenEvent("0.r", 1, [5], finish_reason="stop", stop_reason=5, num_cached_tokens=7)]),
    Events([TokenEvent("0.r", 0, error=("it failed", "numerical_error"), finish_reason="error")]),
    Reply(5, b"\x01"),
    Reply(5, error=("ConfigError", "no")),
    Failure("gone"),
    Heartbeat(1, 2, 3, 0.5, 9.0, "asleep"),
]


@pytest.mark.parametrize("message", UP, ids=lambda message: type(message).__name__)
def test_what_a_door_says_comes_out_as_it_went_in(message: wire.Up) -> None:
    assert decode_up(bytes(encode(7, message))) == (7, message)


@pytest.mark.parametrize("message", DOWN, ids=lambda message: type(message).__name__)
def test_what_the_engine_says_comes_out_as_it_went_in(message: wire.Down) -> None:
    assert decode_down(bytes(encode(2**63, message))) == (2**63, message)


def test_neither_side_takes_what_only_the_other_may_say() -> None:
    for message in UP:
        with pytest.raises(WireError):
            decode_down(bytes(encode(0, message)))
    for message in DOWN:
        with pytest.raises(WireError):
            decode_up(bytes(encode(0, message)))


@pytest.mark.parametrize("dtype", wire.ARRAY_TYPES)
@pytest.mark.parametrize("shape", [(0,), (3,), (2, 5), (2, 0, 4)])
def test_arrays_keep_type_shape_and_content(dtype: str, shape: tuple[int, ...]) -> None:
    array = (np.random.default_rng(1).random(shape) * 100).astype(dtype)
    logprobs = [TokenLogprobs(3, -0.5, 1, [(3, -0.5), (4, -1.25)])]
    extras = [("hidden_states", 4, array), ("prompt_logprobs", 0, logprobs)]
    frame = encode(0, Events([TokenEvent("0.r", 0, [1], extras=extras)]))
    message = decode_down(bytes(frame))[1]
    assert isinstance(message, Events)
    own_events(message.events, "0.")
    (event,) = message.events
    assert event.request_id == "r"
    (what, start, found), (_, _, found_logprobs) = event.extras
    assert (what, start) == ("hidden_states", 4) and found.dtype == array.dtype
    np.testing.assert_array_equal(found, array)
    assert found_logprobs == logprobs
    # Memory of its own: the frame may go.
    assert found.flags.owndata and found.flags.writeable


def test_a_slice_crosses_as_what_it_shows() -> None:
    array = np.arange(12, dtype=np.float32).reshape(3, 4)[::2, 1:3]
    found = decode_value("any", encode_value({"x": array}))["x"]
    np.testing.assert_array_equal(found, array)


@pytest.mark.parametrize("dtype", ["float64", "complex64", "object", "<U3", "bool"])
def test_arrays_of_other_types_do_not_cross(dtype: str) -> None:
    with pytest.raises(EngineError, match="does not cross"):
        encode_value(np.zeros(2, dtype=dtype))


BAD_ARRAYS = {
    "an unknown code": msgspec.msgpack.Ext(9, b"\0\1" + bytes(12)),
    "an unknown type": msgspec.msgpack.Ext(1, b"\x77\1" + (1).to_bytes(8, "little") + bytes(4)),
    "too short": msgspec.msgpack.Ext(1, b"\0"),
    "no shape": msgspec.msgpack.Ext(1, b"\0\5" + bytes(8)),
    "too few bytes": msgspec.msgpack.Ext(1, b"\0\1" + (3).to_bytes(8, "little") + bytes(8)),
    "a huge shape": msgspec.msgpack.Ext(1, b"\0\2" + (2**63).to_bytes(8, "little") * 2 + bytes(8)),
}


@pytest.mark.parametrize("name", BAD_ARRAYS)
def test_malformed_arrays_are_refused(name: str) -> None:
    body = {"type": "Events", "events": [{"request_id": "r", "index": 0, "extras": [BAD_ARRAYS[name]]}]}
    frame = wire.HEADER.pack(wire.MAGIC, wire.PROTOCOL_VERSION, 0) + msgspec.msgpack.encode(body)
    with pytest.raises(WireError):
        decode_down(frame)


def test_errors_quote_nothing() -> None:
    good = bytes(encode(0, Ask(1, "hush-hush", {"prompt": "hush-hush"})))
    body = msgspec.msgpack.encode({"type": "hush-hush", "hush-hush": 1})
    frames = [
        good[:10],
        good[:-1],
        b"hush-hush hush-hush",
        good.replace(b"SLIP", b"hush"),
        wire.HEADER.pack(wire.MAGIC, 9, 0) + body,
        wire.HEADER.pack(wire.MAGIC, wire.PROTOCOL_VERSION, 0) + body,
        good + bytes(wire.MAX_FRAME_BYTES),
    ]
    for frame in frames:
        with pytest.raises(WireError) as caught:
            decode_up(frame)
        assert "hush" not in str(caught.value) and caught.value.__cause__ is None


def test_deep_nesting_is_refused_in_bounded_depth() -> None:
    deep: Any = 0
    data = msgspec.msgpack.encode({"type": "Ask", "call_id": 1, "name": "x"})
    nested = b"\x91" * 100_000 + b"\xc0"
    body = b"\x84" + data[1:] + b"\xa9arguments" + b"\x81\xa1x" + nested
    assert deep == 0
    with pytest.raises(WireError):
        decode_up(wire.HEADER.pack(wire.MAGIC, wire.PROTOCOL_VERSION, 0) + body)


@pytest.mark.parametrize("kind", [CheckpointError, ConfigError, EngineError, UnsupportedError])
def test_our_errors_cross_as_themselves(kind: type[Exception]) -> None:
    error = error_from(error_parts(kind("what to do")))
    assert type(error) is kind and str(error) == "what to do"


def test_other_errors_cross_without_their_words() -> None:
    assert "hush" not in str(error_from(error_parts(ValueError("hush-hush"))))
    assert str(error_from(error_parts(RequestError("refused")))) == "refused"
    assert type(error_from(("os.system", "x"))) is EngineError
