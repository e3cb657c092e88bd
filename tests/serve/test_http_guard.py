"""Is every state of a connection bounded in time and size? Raw sockets against a real server.

The server runs in a thread of this process with a small application; time-outs are short, and every wait of
a test ends at a deadline that only a hang reaches.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import random
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
import uvicorn

from slipstream.serve.body_limits import BodyLimits
from slipstream.serve.http_guard import guarded_protocol
from slipstream.serve.settings import ServeSettings

DEADLINE_S = 30.0
MAX_BODY = 64 * 1024
SETTINGS = ServeSettings(
    header_timeout_s=0.6,
    idle_timeout_s=1.0,
    slow_reader_timeout_s=0.5,
    max_body_bytes=MAX_BODY,
    max_header_bytes=8192,
    max_url_bytes=1024,
    max_headers=50,
    max_connections=1000,
)
BODY_CHECK_S = 0.4


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Echo a body's size; `/big` answers without an end, `/early` before the body, `/slow` a second later."""
    if scope["type"] != "http":
        return
    if scope["path"] == "/big":
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while (await asyncio.wait_for(send_one(send), DEADLINE_S)) is None:
            if app_state.is_big_dropped(receive):
                return
    size = 0
    while scope["path"] != "/early":
        message = await receive()
        if message["type"] == "http.disconnect":
            app_state.num_disconnects += 1
            return
        size += len(message["body"])
        if not message["more_body"]:
            break
    if scope["path"] == "/slow":
        await asyncio.sleep(1.2)
    body = json.dumps({"size": size, "num_headers": len(scope["headers"])}).encode()
    headers = [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def send_one(send: Any) -> None:
    await send({"type": "http.response.body", "body": b"x" * 65536, "more_body": True})
    await asyncio.sleep(0)


@dataclasses.dataclass
class AppState:
    num_disconnects: int = 0
    num_big_dropped: int = 0

    def is_big_dropped(self, receive: Any) -> bool:
        cycle = (
            receive.__self__._receive.__self__ if hasattr(receive.__self__, "_receive") else receive.__self__
        )
        self.num_big_dropped += cycle.disconnected
        return cycle.disconnected


app_state = AppState()


@contextlib.contextmanager
def serving(settings: ServeSettings) -> Iterator[tuple[str, int]]:
    """Run the application on a thread; yields its address."""
    config = uvicorn.Config(
        BodyLimits(app, max_body_bytes=MAX_BODY),
        http=guarded_protocol(settings, body_check_s=BODY_CHECK_S),
        ws="none",
        lifespan="off",
        log_config=None,
        timeout_keep_alive=1,
        timeout_graceful_shutdown=1,
    )
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    listening.listen(1024)
    running = uvicorn.Server(config)
    thread = threading.Thread(target=running.run, args=([listening],), daemon=True)
    thread.start()
    yield listening.getsockname()
    running.should_exit = True
    thread.join(DEADLINE_S)
    assert not thread.is_alive()


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, int]]:
    with serving(SETTINGS) as address:
        yield address


def connect(server: tuple[str, int]) -> socket.socket:
    peer = socket.create_connection(server, timeout=DEADLINE_S)
    peer.settimeout(DEADLINE_S)
    return peer


def send_what_is_taken(peer: socket.socket, data: bytes, *, times: int = 1) -> bool:
    """Send until the server has had enough; False where it closed the connection."""
    try:
        for _ in range(times):
            peer.sendall(data)
    except (ConnectionResetError, BrokenPipeError):
        return False
    return True


def read_all(peer: socket.socket) -> bytes:
    """Read until the server closes."""
    data = b""
    try:
        while piece := peer.recv(65536):
            data += piece
    except ConnectionResetError:
        pass
    return data


def status_of(data: bytes) -> int:
    return int(data.split(b" ", 2)[1]) if data else 0


def read_response(peer: socket.socket) -> tuple[int, dict[str, Any]]:
    """Read one response with a content-length; the connection stays open."""
    data = b""
    while b"\r\n\r\n" not in data:
        piece = peer.recv(65536)
        assert piece, data
        data += piece
    head, _, body = data.partition(b"\r\n\r\n")
    length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
    while len(body) < length:
        body += peer.recv(65536)
    return status_of(head), json.loads(body)


def is_alive(server: tuple[str, int]) -> bool:
    with connect(server) as peer:
        peer.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        return read_response(peer)[0] == 200


def test_a_connection_serves_one_request_after_another(server: Any) -> None:
    with connect(server) as peer:
        for size in (0, 10, MAX_BODY):
            peer.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % size + b"x" * size)
            assert read_response(peer) == (200, {"size": size, "num_headers": 2})


def test_pipelined_requests_are_answered_in_order(server: Any) -> None:
    with connect(server) as peer:
        one = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n"
        peer.sendall(one % 3 + b"abc" + one % 5 + b"abcde" + one % 0)
        assert [read_size(peer) for _ in range(3)] == [3, 5, 0]


def read_size(peer: socket.socket) -> int:
    """Read exactly one response, byte by byte, since another may follow it."""
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        head += peer.recv(1)
    length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
    return json.loads(b"".join(peer.recv(1) for _ in range(length)))["size"]


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"GET / HTTP/1.1\r\nX-Big: " + b"y" * (1 << 20), 431),
        (b"GET / HTTP/1.1\r\n" + b"".join(b"X-%d: 1\r\n" % i for i in range(10_000)) + b"\r\n", 431),
        (b"GET / HTTP/1.1\r\n" + b"".join(b"X-%d: 1\r\n" % i for i in range(51)) + b"\r\n", 431),
        (b"GET /" + b"a" * 2000 + b" HTTP/1.1\r\n\r\n", 414),
        (b"GET /" + b"a" * (1 << 20), 414),
        (b"G" * 9000, 400),
        (b"\x16\x03\x01\x02\x00\x01\x00", 400),
        (b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost x\r\n\r\n", 400),
    ],
)
def test_r03_a_head_over_its_bounds_is_refused(server: Any, sent: bytes, status: int) -> None:
    with connect(server) as peer:
        send_what_is_taken(peer, sent)
        data = read_all(peer)
    # A peer that still sends may see a closed connection instead of the answer.
    assert status_of(data) in ({status} if len(sent) < 20_000 else {status, 0})
    if data:
        error = json.loads(data.partition(b"\r\n\r\n")[2])["error"]
        assert set(error) == {"message", "type", "param", "code"}
    assert is_alive(server)


def test_r03_a_head_at_its_bounds_passes(server: Any) -> None:
    with connect(server) as peer:
        headers = b"".join(b"X-%d: 1\r\n" % i for i in range(49))
        peer.sendall(b"GET /" + b"a" * 1000 + b" HTTP/1.1\r\nHost: x\r\n" + headers + b"\r\n")
        assert read_response(peer) == (200, {"size": 0, "num_headers": 50})


def test_r03_a_slow_head_is_ended_by_its_deadline(server: Any) -> None:
    """Also on a connection that was served before, and however steadily the bytes come."""
    with connect(server) as peer:
        peer.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert read_response(peer)[0] == 200
        started = time.monotonic()
        peer.settimeout(0.1)
        data = b""
        for byte in b"GET / HTTP/1.1\r\nX: " + b"y" * 1000:
            try:
                peer.sendall(bytes([byte]))
                data = peer.recv(65536)
                break
            except TimeoutError:
                assert time.monotonic() - started < DEADLINE_S
        assert status_of(data) == 408


def test_r03_500_idle_openers_are_closed_and_hold_nobody_up(server: Any) -> None:
    before = psutil.Process().num_fds()
    peers: list[socket.socket] = []
    for number in range(500):
        peers.append(connect(server))
        if number % 2 == 0:
            peers[-1].sendall(b"GET / HT")
    assert is_alive(server)
    answers = [status_of(read_all(peer)) for peer in peers]
    assert set(answers[::2]) == {408} and set(answers[1::2]) == {0}
    for peer in peers:
        peer.close()
    wait_until(lambda: psutil.Process().num_fds() <= before + 2)


def test_r03_connections_beyond_the_cap_are_refused() -> None:
    settings = dataclasses.replace(SETTINGS, max_connections=4, header_timeout_s=DEADLINE_S)
    with serving(settings) as server:
        peers = [connect(server) for _ in range(4)]
        with connect(server) as late:
            assert status_of(read_all(late)) == 503
        for peer in peers:
            peer.close()
        wait_until(lambda: is_answered(server))


def is_answered(server: Any) -> bool:
    try:
        return is_alive(server)
    except (AssertionError, OSError):
        return False


def wait_until(is_true: Any) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_an_idle_connection_is_closed_after_its_answer(server: Any) -> None:
    with connect(server) as peer:
        peer.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert read_response(peer)[0] == 200
        assert read_all(peer) == b""


def test_an_answer_may_take_longer_than_any_timeout_of_the_head(server: Any) -> None:
    with connect(server) as peer:
        # A line end too many after a body is an old client's habit, not the begin of another request.
        peer.sendall(b"POST /slow HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\nx\r\n")
        assert read_response(peer)[0] == 200


def test_r02_a_body_that_trickles_is_ended(server: Any) -> None:
    with connect(server) as peer:
        peer.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nx")
        before = app_state.num_disconnects
        assert status_of(read_all(peer)) == 408
        wait_until(lambda: app_state.num_disconnects == before + 1)


def test_r02_an_endless_chunked_body_is_answered_413(server: Any) -> None:
    resident = psutil.Process().memory_info().rss
    with connect(server) as peer:
        peer.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        piece = b"4000\r\n" + b"x" * 0x4000 + b"\r\n"
        assert not send_what_is_taken(peer, piece, times=100_000)
    with connect(server) as peer:
        peer.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" + piece * 5)
        assert status_of(read_all(peer)) == 413
    # What was sent is hundreds of times the limit; what an allocator keeps back is some megabytes.
    assert psutil.Process().memory_info().rss - resident < 16 << 20
    assert is_alive(server)


def test_r02_a_declared_body_over_the_limit_is_answered_while_it_is_sent(server: Any) -> None:
    with connect(server) as peer:
        peer.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n" + b"x" * 200_000)
        data = read_all(peer)
    assert status_of(data) == 413 and b"connection: close" in data.lower()


def test_r02_three_million_chunks_of_one_byte_are_cut_short(server: Any) -> None:
    with connect(server) as peer:
        peer.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        send_what_is_taken(peer, b"1\r\nx\r\n" * 10_000, times=300)
        assert status_of(read_all(peer)) in (413, 0)
    assert is_alive(server)


@pytest.mark.parametrize(
    "rest",
    [
        b"1;" + b"e" * 20_000,  # a chunk's extension
        b"1\r\nx\r\n0\r\nT: " + b"t" * 20_000,  # a trailer
        b"1\r\nx\r\n0\r\n" + b"".join(b"T-%d: t\r\n" % i for i in range(500)) + b"\r\n",
    ],
)
def test_r02_what_surrounds_chunks_is_bounded_too(server: Any, rest: bytes) -> None:
    with connect(server) as peer:
        send_what_is_taken(peer, b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" + rest)
        assert status_of(read_all(peer)) in (400, 431, 0)
    assert is_alive(server)


def test_an_early_answer_ends_a_connection_whose_body_nobody_reads(server: Any) -> None:
    with connect(server) as peer:
        peer.sendall(b"POST /early HTTP/1.1\r\nHost: x\r\nContent-Length: 60000\r\n\r\n" + b"x" * 30_000)
        assert status_of(read_all(peer)) == 200


def test_a_reader_that_never_reads_is_dropped(server: Any) -> None:
    before = app_state.num_big_dropped
    with connect(server) as peer:
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        peer.sendall(b"GET /big HTTP/1.1\r\nHost: x\r\n\r\n")
        wait_until(lambda: app_state.num_big_dropped == before + 1)
    assert is_alive(server)


@pytest.mark.parametrize("protocol", [b"websocket", b"h2c"])
def test_r16_an_upgrade_is_answered_as_a_plain_request(server: Any, protocol: bytes) -> None:
    with connect(server) as peer:
        peer.sendall(
            b"GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: "
            + protocol
            + b"\r\n\r\n\x81\x05hello"
        )
        data = read_all(peer)
    assert status_of(data) == 200, "and then it is closed"


def test_a_client_that_waits_to_be_told_is_told(server: Any) -> None:
    with connect(server) as peer:
        head = b"POST / HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: %d\r\n\r\n"
        peer.sendall(head % 5)
        assert peer.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        peer.sendall(b"hello")
        assert read_response(peer)[1]["size"] == 5
    with connect(server) as peer:
        # What is too large is refused before it is sent.
        peer.sendall(head % 1_000_000)
        assert status_of(read_all(peer)) == 413


def test_a_client_of_http_1_0_is_served_and_closed(server: Any) -> None:
    with connect(server) as peer:
        peer.sendall(b"GET / HTTP/1.0\r\n\r\n")
        data = read_all(peer)
    assert status_of(data) == 200 and data.endswith(b'{"size": 0, "num_headers": 0}')


def test_where_the_bytes_are_cut_makes_no_difference(server: Any) -> None:
    """Pipelined requests with bodies of both kinds, sent in pieces of random sizes."""
    rng = random.Random(5)
    for _ in range(60):
        sizes = [rng.choice((0, 1, 17, 5000, MAX_BODY)) for _ in range(rng.randint(1, 4))]
        data = b"".join(request_of(size, rng) for size in sizes)
        with connect(server) as peer:
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while data:
                cut = rng.choice((1, 2, 7, 100, 9000, len(data)))
                peer.sendall(data[:cut])
                data = data[cut:] if rng.random() < 0.9 or len(data) < 20_000 else send_rest(peer, data[cut:])
            assert [read_size(peer) for _ in sizes] == sizes


def send_rest(peer: socket.socket, data: bytes) -> bytes:
    peer.sendall(data)
    return b""


def request_of(size: int, rng: random.Random) -> bytes:
    head = b"POST / HTTP/1.1\r\nHost: x\r\n"
    if rng.random() < 0.5:
        return head + b"Content-Length: %d\r\n\r\n" % size + b"y" * size
    chunks, left = b"", size
    while left:
        length = min(left, rng.randint(1, 30_000))
        chunks += b"%x\r\n" % length + b"y" * length + b"\r\n"
        left -= length
    return head + b"Transfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n"


def test_nonsense_never_stops_it(server: Any) -> None:
    """Valid requests with bytes changed, removed and put in: whatever comes of it, the next one is served."""
    rng = random.Random(6)
    for _ in range(150):
        data = bytearray(request_of(rng.choice((0, 20, 3000)), rng))
        for _ in range(rng.randint(1, 6)):
            place = rng.randrange(len(data))
            match rng.randrange(3):
                case 0:
                    data[place] = rng.randrange(256)
                case 1:
                    del data[place : place + rng.randint(1, 20)]
                    data = data or bytearray(b"x")
                case _:
                    data[place:place] = rng.randbytes(rng.randint(1, 20))
        with connect(server) as peer:
            send_what_is_taken(peer, bytes(data))
            peer.settimeout(0.02)
            with contextlib.suppress(TimeoutError, ConnectionError):
                answer = peer.recv(65536)
                assert not answer or answer.startswith(b"HTTP/1.1 "), answer
    assert is_alive(server)
