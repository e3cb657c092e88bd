"""Is a body over the limit answered 413 before it is held, whether it was declared or came in pieces?"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest

from slipstream.serve.body_limits import BodyLimits

LIMIT = 1000


def run(pieces: list[bytes], *, declared: bytes | list[bytes] | None = None) -> tuple[list[Any], int, int]:
    """Return (messages sent, bytes that the application read, pieces that were taken off the wire)."""
    sent: list[Any] = []
    taken = num_read = 0
    source: Iterator[bytes] = iter(pieces)

    async def receive() -> Any:
        nonlocal taken
        taken += 1
        return {"type": "http.request", "body": next(source), "more_body": taken < len(pieces)}

    async def send(message: Any) -> None:
        sent.append(message)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        nonlocal num_read
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                # What an application may do then: answer all the same.
                break
            num_read += len(message["body"])
            if not message["more_body"]:
                break
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"done"})

    values = declared if isinstance(declared, list) else [declared] if declared is not None else []
    headers = [(b"content-length", value) for value in values]
    asyncio.run(BodyLimits(app, max_body_bytes=LIMIT)({"type": "http", "headers": headers}, receive, send))
    return sent, num_read, taken


def test_r02_a_body_at_the_limit_passes() -> None:
    sent, num_read, _ = run([b"x" * 600, b"x" * 400], declared=b"1000")
    assert sent[0]["status"] == 200 and num_read == LIMIT


def test_r02_a_declared_body_over_the_limit_is_refused_unread() -> None:
    sent, num_read, taken = run([b"x" * 1001], declared=b"1001")
    assert sent[0]["status"] == 413 and (num_read, taken) == (0, 0)
    assert (b"connection", b"close") in sent[0]["headers"]
    assert json.loads(sent[1]["body"])["error"]["code"] == "body_too_large"


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_r02_an_endless_body_is_refused_at_the_piece_that_exceeds_it(size: int) -> None:
    sent, num_read, taken = run([b"x" * size] * 5000)
    assert [message.get("status") for message in sent] == [413, None]
    assert num_read <= LIMIT and taken == LIMIT // size + 1


def test_r02_a_body_longer_than_declared_is_counted_all_the_same() -> None:
    sent, _, _ = run([b"x" * 600] * 3, declared=b"10")
    assert sent[0]["status"] == 413


@pytest.mark.parametrize("value", [b"-1", b"+5", b"1_0", b"", b"x", b"9" * 30, [b"5", b"5"]])
def test_r02_a_length_that_is_no_number_is_refused(value: Any) -> None:
    sent, _, taken = run([b"x"], declared=value)
    assert sent[0]["status"] == 400 and taken == 0
