"""Which clients does a server meet in a long day? Those that crash, stall, time out and talk nonsense.

Each of `CLIENTS` behaves badly once, to a server's address, and leaves nothing open on its own side.
"""

from __future__ import annotations

import contextlib
import json
import random
import socket
import threading
import time
from collections.abc import Callable
from urllib.parse import urlsplit

import httpx

from tests.serve.oracle import DEADLINE_S, Target

Client = Callable[[Target, random.Random], None]


def request_bytes(target: Target, body: bytes, *, length: int | None = None) -> bytes:
    lines = [
        "POST /v1/completions HTTP/1.1",
        "Host: server",
        "Content-Type: application/json",
        f"Content-Length: {len(body) if length is None else length}",
        *(f"{name}: {value}" for name, value in target.headers.items()),
    ]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def body_of(target: Target, rng: random.Random, **changes: object) -> bytes:
    prompt = " ".join(rng.choice(("ba", "de", "fi", "lo", "mu")) for _ in range(rng.randint(1, 60)))
    body = {"model": target.model, "prompt": prompt, "max_tokens": rng.randint(1, 60), "ignore_eos": True}
    return json.dumps({**body, **changes}).encode()


def connect(target: Target) -> socket.socket:
    parts = urlsplit(target.url)
    assert parts.hostname is not None
    return socket.create_connection((parts.hostname, parts.port), timeout=DEADLINE_S)


def leave_mid_stream(target: Target, rng: random.Random) -> None:
    with connect(target) as peer:
        peer.sendall(request_bytes(target, body_of(target, rng, stream=True, max_tokens=400)))
        peer.recv(rng.randint(1, 2000))


def leave_at_once(target: Target, rng: random.Random) -> None:
    with connect(target) as peer:
        peer.sendall(request_bytes(target, body_of(target, rng, stream=rng.random() < 0.5, max_tokens=400)))


def send_half(target: Target, rng: random.Random) -> None:
    body = body_of(target, rng)
    with connect(target) as peer:
        peer.sendall(request_bytes(target, body[: len(body) // 2], length=len(body)))


def send_nonsense(target: Target, rng: random.Random) -> None:
    with connect(target) as peer, contextlib.suppress(ConnectionError):
        peer.sendall(rng.randbytes(rng.randint(1, 5000)))
        peer.recv(100)


def time_out(target: Target, rng: random.Random) -> None:
    with contextlib.suppress(httpx.HTTPError), httpx.Client(headers=target.headers) as client:
        client.post(
            f"{target.url}/v1/completions",
            content=body_of(target, rng, max_tokens=400),
            headers={"Content-Type": "application/json"},
            timeout=rng.uniform(0.001, 0.1),
        )


def ask_badly(target: Target, rng: random.Random) -> None:
    changes: dict[str, object] = {
        rng.choice(("n", "max_tokens", "temperature", "stop")): rng.choice((-1, "x", []))
    }
    with httpx.Client(headers=target.headers, timeout=DEADLINE_S) as client:
        answer = client.post(
            f"{target.url}/v1/completions",
            content=body_of(target, rng, **changes),
            headers={"Content-Type": "application/json"},
        )
        assert answer.status_code in (200, 400), answer.text


def behave(target: Target, rng: random.Random) -> None:
    with httpx.Client(headers=target.headers, timeout=DEADLINE_S) as client:
        answer = client.post(
            f"{target.url}/v1/completions",
            content=body_of(target, rng, n=rng.randint(1, 3)),
            headers={"Content-Type": "application/json"},
        )
        assert answer.status_code in (200, 429), answer.text


CLIENTS: tuple[Client, ...] = (
    leave_mid_stream,
    leave_at_once,
    send_half,
    send_nonsense,
    time_out,
    ask_badly,
    behave,
)


def run_rough(target: Target, *, seconds: float, num_threads: int = 4, seed: int = 0) -> int:
    """Let clients come and go for a while; returns how many there were. Raises what one did not expect."""
    deadline = time.monotonic() + seconds
    counts = [0] * num_threads
    failures: list[BaseException] = []

    def work(number: int) -> None:
        rng = random.Random(seed * 1000 + number)
        while time.monotonic() < deadline and not failures:
            try:
                rng.choice(CLIENTS)(target, rng)
            except BaseException as error:
                failures.append(error)
            counts[number] += 1

    threads = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(num_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(seconds + DEADLINE_S)
        assert not thread.is_alive(), "a client hangs"
    if failures:
        raise failures[0]
    return sum(counts)
