"""Does an engine behind sockets serve each door as if it were alone, and survive what anybody sends it?"""

from __future__ import annotations

import ast
import io
import os
import pickle
import random
import socket
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq

from slipstream import __version__
from slipstream.core.errors import ConfigError, EngineError, RequestError
from slipstream.core.sampling_params import SamplingParams
from slipstream.engine import sockets, wire
from slipstream.engine.client import QUIET_S
from slipstream.engine.engine_server import MAX_REMEMBERED, EngineServer
from slipstream.engine.process_client import submissions
from slipstream.engine.prompts import Encoded
from slipstream.engine.request_message import RequestMessage, message_of
from slipstream.engine.service import EngineService
from slipstream.engine.sockets import Endpoint, make_endpoint
from slipstream.engine.wire import Ask, Failure, Goodbye, Hello, Submit, Welcome
from tests.engine.served import DEADLINE_S, Stream, door, eventually, fake_client, prompt, serving

# So that a request of some hundred tokens runs while something else happens.
STEP_S = 0.0005
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def server() -> Iterator[EngineServer]:
    with serving(fake_client(step_s=STEP_S)) as server:
        yield server


@pytest.fixture
def service(server: EngineServer) -> Iterator[EngineService]:
    with door(server.endpoint) as service:
        yield service


class Stranger:
    """A bare socket that speaks whatever it likes."""

    def __init__(self, endpoint: Endpoint, *, receives: int = 0) -> None:
        self.context: zmq.Context[Any] = zmq.Context()
        self.socket = self.context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.RCVHWM, receives)
        self.socket.setsockopt(zmq.LINGER, 1000)
        self.socket.connect(endpoint.address)
        self.endpoint = endpoint

    def __enter__(self) -> Stranger:
        return self

    def __exit__(self, *args: object) -> None:
        self.socket.close()
        self.context.term()

    def greet(self, sequence: int = 0) -> wire.Down:
        self.send(sequence, Hello(self.endpoint.secret, __version__, os.getpid()))
        answer = self.hear()
        assert answer is not None, "no answer to a greeting"
        return answer

    def send(self, sequence: int, message: wire.Message) -> None:
        self.socket.send(wire.encode(sequence, message))

    def hear(self, timeout_s: float = DEADLINE_S) -> wire.Down | None:
        return wire.decode_down(self.socket.recv())[1] if self.socket.poll(timeout_s * 1000) else None


def request_message(request_id: str = "r", **changes: Any) -> RequestMessage:
    fields: dict[str, Any] = {
        "request_id": request_id,
        "prompt_token_ids": [5, 6],
        "sampling": {},
        "max_tokens": 3,
        "stop_token_ids": [],
        "seed": 7,
        "arrival_s": 0.0,
    }
    return wire.msgspec.convert(fields | changes, RequestMessage)


def test_streams_are_what_they_would_be_alone(service: EngineService) -> None:
    streams = [Stream(service, prompt(i), 20 + i) for i in range(8)]
    streams.append(Stream(service, prompt(9), 15, n=3))
    for stream in streams:
        stream.check()
    assert service.health().is_ready and service.health().num_steps >= 0


def test_doors_may_use_the_same_request_ids(server: EngineServer) -> None:
    with door(server.endpoint) as one, door(server.endpoint) as other:
        streams = [
            Stream(service, prompt(i), 400, request_id="same") for i, service in enumerate((one, other))
        ]
        for stream in streams:
            stream.begin()
        streams[0].abort()
        assert streams[0].wait().outputs[0].finish_reason == "cancelled"
        streams[1].check()
        assert one.stats().result(DEADLINE_S)["num_doors"] == 2
        assert one.stats().result(DEADLINE_S)["finish_reasons"] == {"cancelled": 1}


@pytest.mark.parametrize("use_tcp", [False, True])
def test_loopback_ports_do_where_there_are_no_unix_sockets(use_tcp: bool) -> None:
    with serving(use_tcp=use_tcp) as server, door(server.endpoint) as service:
        assert server.endpoint.address.startswith("tcp://127.0.0.1:" if use_tcp else "ipc://")
        Stream(service, prompt(1), 10).check()


def test_commands_run_by_name_and_their_errors_come_back(service: EngineService) -> None:
    values = {"words": ["a", "b"], "number": 3, "none": None, "nested": {"x": 1.5}}
    assert service.command("echo", **values).result(DEADLINE_S) == values
    with pytest.raises(ConfigError, match=r"no command 'eco'.*Did you mean 'echo'"):
        service.command("eco").result(DEADLINE_S)
    with pytest.raises(ConfigError, match="missing a required argument: 'seconds'"):
        service.command("hang").result(DEADLINE_S)
    with pytest.raises(EngineError, match="raised ZeroDivisionError"):
        service.command("fail").result(DEADLINE_S)
    with pytest.raises(EngineError, match="does not cross"):
        service.command("object").result(DEADLINE_S)
    with pytest.raises(ConfigError, match="runs in another process"):
        service.command("echo", tensor=object())
    assert service.health().is_ready


def test_a_command_that_waits_for_idle_holds_back_no_other(service: EngineService) -> None:
    stream = Stream(service, prompt(1), 3000).begin()
    idle = service.command("idle")
    assert service.stats().result(DEADLINE_S)["num_running"] == 1
    assert not idle.done()
    stream.abort()
    assert idle.result(DEADLINE_S) == 0


def test_statistics_see_what_came_before_them(service: EngineService) -> None:
    """A reply is handed out once the events before it are processed: counts never lag behind an output."""
    for i in range(20):
        stream = Stream(service, prompt(i), 2)
        stream.wait()
        assert service.stats().result(DEADLINE_S)["finish_reasons"] == {"length": i + 1}


def test_callables_need_the_engine_in_this_process(service: EngineService) -> None:
    params = SamplingParams(logits_processor=lambda ids, logits: logits)
    request = service.create_request(Encoded([5]), params)
    with pytest.raises(RequestError, match="needs the engine in this process") as caught:
        service.submit(request, lambda output: None)
    assert caught.value.param == "logits_processor"
    Stream(service, prompt(1), 5, request_id=request.request_id).check()


def test_quiet_time_is_used_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the engine could prepare waits for the first quiet, goes on in one go, and ends at a request."""
    client = fake_client(step_s=0.005)
    runner: Any = client.engine.runner
    num_left = 20
    seen: list[tuple[float, bool]] = []

    def prepare() -> None:
        nonlocal num_left
        num_left -= 1
        seen.append((time.monotonic(), client.engine.scheduler.has_work))
        runner.wants_capture = num_left > 0

    monkeypatch.setattr(runner, "capture_wanted", prepare, raising=False)
    with serving(client) as server, door(server.endpoint) as service:
        runner.wants_capture = True
        Stream(service, prompt(1), 40).check()
        eventually(lambda: num_left == 0, "quiet time was not used")
    times = [at for at, _ in seen]
    assert len(seen) == 20 and not any(has_work for _, has_work in seen)
    # One wait, not one each.
    assert times[-1] - times[0] < 10 * QUIET_S


def test_draining_ends_what_runs_and_takes_nothing_new() -> None:
    with serving(fake_client(step_s=0.002)) as server, door(server.endpoint) as service:
        running = Stream(service, prompt(1), 60).begin()
        server.drain()
        late = Stream(service, prompt(2), 5)
        error = late.wait().error
        assert error is not None and error.code == "engine_stopped" and "shutting down" in error.message
        running.check()
        eventually(lambda: service.health().state == "stopped", "a drained engine is gone")


def test_an_engine_that_raises_fails_every_door(server: EngineServer, service: EngineService) -> None:
    stream = Stream(service, prompt(1), 4000).begin()

    def explode() -> None:
        raise RuntimeError("the device is gone")

    server._client.engine.scheduler.plan = explode  # type: ignore[method-assign,assignment]
    error = stream.wait().error
    assert error is not None and error.code == "engine_stopped" and "RuntimeError" in error.message
    # So that the fixture's books balance.
    del server._client.engine.scheduler.plan
    server._client.engine.scheduler.abort("0." + stream.request.request_id)
    server._client.engine._in_flight.clear()
    server._client.engine.scheduler._outstanding.clear()
    server._client.engine.scheduler.cache.pool.retire(10**6)


SEARCH = {"width": 8, "length_penalty": 1.0, "early_stopping": True}
BAD_REQUESTS = [
    ("negative id", {"prompt_token_ids": [5, -1]}, "prompt_token_ids"),
    ("id beyond the vocabulary", {"prompt_token_ids": [5, 1000]}, "prompt_token_ids"),
    ("a huge id", {"prompt_token_ids": [2**63]}, "prompt_token_ids"),
    ("no prompt", {"prompt_token_ids": []}, "prompt_token_ids"),
    ("too long", {"max_tokens": 100_000}, "max_tokens"),
    ("nothing to do", {"max_tokens": 0}, "max_tokens"),
    ("too many samples", {"num_samples": 10**9}, "n"),
    ("more shown than made", {"num_returned": 2}, "n"),
    ("a stop beyond the vocabulary", {"stop_token_ids": [2**40]}, "stop_token_ids"),
    ("too many stops", {"stop_token_ids": [5] * 100_000}, "stop_token_ids"),
    ("no temperature", {"sampling": {"temperature": float("nan")}}, "temperature"),
    ("hot", {"sampling": {"temperature": 1e30}}, "temperature"),
    ("no top_p", {"sampling": {"top_p": 0.0}}, "top_p"),
    ("a bias without a token", {"sampling": {"logit_bias": [(1000, 1.0)]}}, "logit_bias"),
    ("an infinite bias", {"sampling": {"logit_bias": [(5, float("inf"))]}}, "logit_bias"),
    ("nothing allowed", {"sampling": {"allowed_ids": [5], "bad_ids": [5]}}, "allowed_token_ids"),
    ("all bad", {"sampling": {"bad_ids": list(range(1000))}}, "bad_token_ids"),
    ("logprobs without end", {"sampling": {"logprobs": 10**6}}, "logprobs"),
    ("prompt logprobs", {"sampling": {"prompt_logprobs": -2}}, "prompt_logprobs"),
    ("callables", {"sampling": {"has_processors": True}}, "logits_processor"),
    ("a search without one", {"sampling": {"num_candidates": 10**6}}, "num_candidates"),
    ("a wide search", {"beams": {"width": 10**6, "length_penalty": 1.0, "early_stopping": True}}, "beam"),
    ("a search that ends short", {"beams": SEARCH, "num_samples": 5, "num_returned": 2}, "n"),
    ("a salt with a newline", {"cache_salt": "a\nb"}, "cache_salt"),
    ("priority", {"priority": 2**40}, "priority"),
    ("a deadline that never was", {"deadline_s": float("nan")}, "timeout_s"),
    ("from the future", {"arrival_s": 1e18}, "arrival_s"),
    ("a range that is none", {"kv_retention": [[(5, 3, 1, None)], 35, None]}, "token_end"),
]


@pytest.mark.parametrize(("name", "changes", "param"), BAD_REQUESTS, ids=[row[0] for row in BAD_REQUESTS])
def test_r07_the_engine_looks_again(
    server: EngineServer, service: EngineService, name: str, changes: dict[str, Any], param: str
) -> None:
    """What no gate let through still comes back as that request's error, and the door goes on."""
    victim = Stream(service, prompt(1), 30)
    with Stranger(server.endpoint) as stranger:
        assert isinstance(stranger.greet(), Welcome)
        stranger.send(1, Submit([request_message("bad", **changes)]))
        answer = stranger.hear()
        assert isinstance(answer, wire.Events)
        assert all(event.finish_reason == "error" for event in answer.events)
        assert len(answer.events) <= 1024
        error = answer.events[0].error
        assert error is not None and param in error[0] and len(error[0]) < 400
        stranger.send(2, Submit([request_message("good")]))
        assert isinstance(stranger.hear(), wire.Events)
        stranger.send(3, Goodbye())
    victim.check()


@pytest.mark.parametrize("value", [1.5, True, "5", None, [5]])
def test_r07_ids_of_another_type_are_no_message(server: EngineServer, value: object) -> None:
    body: Any = wire.msgspec.to_builtins(Submit([request_message()]))
    body["requests"][0]["prompt_token_ids"] = [value]
    with Stranger(server.endpoint) as stranger:
        stranger.greet()
        header = wire.HEADER.pack(wire.MAGIC, wire.PROTOCOL_VERSION, 1)
        stranger.socket.send(header + wire.msgspec.msgpack.encode(body))
        assert isinstance(stranger.hear(), Failure)
    assert server.num_dropped_frames == 1


class Bomb:
    """What pickle would run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.path),)


def hostile_frames(rng: random.Random, marker: Path) -> list[list[bytes]]:
    """Return frames (lists of parts) that no door would send."""
    good = bytes(wire.encode(0, Hello("x" * 64, __version__, 1)))
    header, body = good[: wire.HEADER.size], good[wire.HEADER.size :]
    buffer = io.BytesIO()
    pickle.dump(Bomb(marker), buffer)
    frames = [
        [b""],
        [good[:7]],
        [header],
        [good[:-3]],
        [good + b"\0"],
        [wire.HEADER.pack(b"EVIL", 1, 0) + body],
        [wire.HEADER.pack(wire.MAGIC, 2, 0) + body],
        [wire.HEADER.pack(wire.MAGIC, 65535, 2**64 - 1) + body],
        [buffer.getvalue()],
        [header + buffer.getvalue()],
        [header + b"\x91" * 5000],
        [header + b"\xdd\xff\xff\xff\xff"],
        [header + b"\xc7\xff\x01" + bytes(255)],
        [good, good],
        [b"x"] * 50,
        [header + bytes(wire.MAX_FRAME_BYTES)],
        [b"GET / HTTP/1.1\r\n\r\n"],
    ]
    frames += [[rng.randbytes(rng.randrange(300))] for _ in range(30)]
    frames += [[header + rng.randbytes(rng.randrange(300))] for _ in range(30)]
    for _ in range(30):
        mutated = bytearray(good)
        for _ in range(rng.randrange(1, 4)):
            mutated[rng.randrange(len(mutated))] ^= 1 << rng.randrange(8)
        frames.append([bytes(mutated)])
    return frames


@pytest.mark.parametrize("seed", [1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 30))])
def test_r62_r65_hostile_frames_are_dropped_and_counted(
    server: EngineServer,
    service: EngineService,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    seed: int,
) -> None:
    marker = tmp_path / "code-has-run"
    frames = hostile_frames(random.Random(seed), marker)
    victim = Stream(service, prompt(3), 1500).begin()
    for parts in frames:
        with Stranger(server.endpoint) as stranger:
            stranger.socket.send_multipart(parts)
    eventually(lambda: server.num_dropped_frames >= len(frames), "a frame was not counted")
    assert server.num_dropped_frames == len(frames)
    victim.check()
    assert not marker.exists()
    assert service.stats().result(DEADLINE_S)["num_dropped_frames"] == len(frames)
    assert service.stats().result(DEADLINE_S)["num_doors"] == 1
    assert len(server._distrusted) <= MAX_REMEMBERED
    # Logged, without what they held.
    assert "dropped a frame" in caplog.text
    assert not any(held in caplog.text for held in ("mkdir", "GET /", "EVIL", str(tmp_path)))


def test_r62_bytes_that_are_no_zmq_are_refused(server: EngineServer, service: EngineService) -> None:
    victim = Stream(service, prompt(3), 400).begin()
    rng = random.Random(2)
    for address in (server.endpoint.address, server.endpoint.heartbeat):
        for length in (1, 64, 5000):
            with socket.socket(socket.AF_UNIX) as raw:
                raw.settimeout(DEADLINE_S)
                raw.connect(address.removeprefix("ipc://"))
                try:
                    raw.sendall(rng.randbytes(length))
                except BrokenPipeError:
                    continue
    victim.check()


@pytest.mark.parametrize("kind", ["replayed", "skipped", "garbage", "second greeting", "an id in use"])
def test_r65_a_door_that_misbehaves_is_not_heard_again(
    server: EngineServer, service: EngineService, kind: str
) -> None:
    victim = Stream(service, prompt(4), 20_000).begin()
    with Stranger(server.endpoint) as stranger:
        stranger.greet()
        stranger.send(1, Submit([request_message("long", max_tokens=20_000)]))
        assert isinstance(stranger.hear(), wire.Events)
        match kind:
            case "replayed":
                stranger.send(1, Submit([request_message("again")]))
            case "skipped":
                stranger.send(3, Ask(1, "stats", {}))
            case "garbage":
                stranger.socket.send(b"garbage")
            case "second greeting":
                stranger.send(2, Hello(stranger.endpoint.secret, __version__, os.getpid()))
            case _:
                stranger.send(2, Submit([request_message("long")]))
        # Its request ends, and even a proper greeting finds no ear.
        eventually(lambda: server.num_dropped_frames == 1, "it was trusted on")
        stranger.send(0, Hello(stranger.endpoint.secret, __version__, os.getpid()))
        eventually(lambda: server.num_dropped_frames == 2, "it was greeted again")
        heard = [stranger.hear(0.0)]
        while heard[-1] is not None:
            heard.append(stranger.hear(0.0))
        assert not any(isinstance(message, Welcome) for message in heard)
    eventually(lambda: len(server._owners) <= 1 and not victim.is_done.is_set(), "its request runs on")
    eventually(lambda: service.stats().result(DEADLINE_S)["num_running"] == 1, "its request runs on")
    victim.abort()


def test_a_wrong_secret_opens_nothing(server: EngineServer) -> None:
    wrong = Endpoint(server.endpoint.address, server.endpoint.heartbeat, "0" * 64)
    with Stranger(wrong) as stranger:
        stranger.send(0, Hello(wrong.secret, __version__, os.getpid()))
        eventually(lambda: server.num_dropped_frames == 1, "it was not counted")
        assert stranger.hear(0.05) is None
    with pytest.raises(EngineError, match="No engine answered"), door(wrong, connect_s=0.05):
        pass


def test_r70_a_door_of_another_version_is_told_so(server: EngineServer) -> None:
    with Stranger(server.endpoint) as stranger:
        stranger.send(0, Hello(stranger.endpoint.secret, "99.0", os.getpid()))
        answer = stranger.hear()
        assert isinstance(answer, Failure) and __version__ in answer.cause


def test_a_flood_does_not_hold_up_the_steps(server: EngineServer, service: EngineService) -> None:
    victim = Stream(service, prompt(5), 300)
    stopping = threading.Event()

    def flood() -> None:
        with Stranger(server.endpoint) as stranger:
            stranger.socket.setsockopt(zmq.LINGER, 0)
            while not stopping.is_set():
                for _ in range(100):
                    stranger.socket.send(b"flood")
                time.sleep(0.001)

    thread = threading.Thread(target=flood)
    thread.start()
    try:
        victim.check()
    finally:
        stopping.set()
        thread.join(DEADLINE_S)
    assert server.num_dropped_frames > 0


def test_r34_a_door_that_leaves_or_stops_reading_frees_its_pages(server: EngineServer) -> None:
    with door(server.endpoint) as watcher:
        stream = Stream(watcher, prompt(1), 20).begin()
        with door(server.endpoint) as leaving:
            for i in range(10):
                Stream(leaving, prompt(i), 2_000).begin()
        eventually(lambda: watcher.stats().result(DEADLINE_S)["num_doors"] == 1, "a door that left stays")
        eventually(lambda: watcher.stats().result(DEADLINE_S)["num_running"] == 0, "its requests run on")
        # One whose connection breaks without a word: the next frame for it cannot be delivered.
        with Stranger(server.endpoint) as stranger:
            stranger.greet()
            stranger.send(1, Submit([request_message("long", max_tokens=20_000)]))
            assert isinstance(stranger.hear(), wire.Events)
        eventually(lambda: watcher.stats().result(DEADLINE_S)["num_doors"] == 1, "a broken door stays")
        stats = watcher.stats().result(DEADLINE_S)
        assert stats["num_free_pages"] == stats["num_pages"] and stats["num_running"] == 0
        stream.check()


def test_r34_a_door_that_does_not_read_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Frames for it fill the pipe; the engine never waits, and its memory stays bounded."""
    # Enough for the victim's own door, which a busy machine may keep from reading for a moment.
    monkeypatch.setattr(sockets, "MAX_WAITING_FRAMES", 60)
    with serving() as server, door(server.endpoint) as service:
        with Stranger(server.endpoint, receives=1) as stranger:
            stranger.send(0, Hello(stranger.endpoint.secret, __version__, os.getpid()))
            requests = [request_message(f"r{i}", num_samples=8, max_tokens=700) for i in range(7)]
            stranger.send(1, Submit(requests))
            eventually(lambda: server._heart._client.num_steps > 0, "nothing runs")
            victim = Stream(service, prompt(5), 50)
            eventually(lambda: service.stats().result(DEADLINE_S)["num_doors"] == 1, "it is waited for")
            victim.check()
        eventually(lambda: service.stats().result(DEADLINE_S)["num_running"] == 0, "its requests run on")


def test_a_batch_of_any_size_crosses_in_frames_that_are_taken(service: EngineService) -> None:
    """17 million ids do not fit into one frame; a request alone always does."""
    params = SamplingParams(max_tokens=1, seed=7, detokenize=False)
    done = threading.Semaphore(0)
    prompts = [[5] * 90_000 for _ in range(24)]
    batch = [service.create_request(Encoded(ids), params) for ids in prompts]
    messages = submissions([message_of(request) for request in batch])
    assert len(messages) == 3 and [len(message.requests) for message in messages] == [11, 11, 2]
    assert all(len(wire.encode(0, message)) < wire.MAX_FRAME_BYTES // 2 for message in messages)
    small = [service.create_request(Encoded(prompt(i)), params) for i in range(500)]
    service.submit_batch([(request, lambda output: done.release()) for request in small])
    assert all(done.acquire(timeout=DEADLINE_S) for _ in small)


def storm(num_requests: int, seed: int) -> None:
    """Requests of several doors end by themselves, are aborted, or lose their door, at random moments."""
    rng = random.Random(seed)
    with serving() as server, door(server.endpoint) as steady:
        canary = Stream(steady, prompt(1), 2500).begin()
        done = 0
        while done < num_requests:
            with door(server.endpoint) as service:
                streams: list[Stream] = []
                for _ in range(rng.randrange(1, 12)):
                    length = rng.choice((1, 7, 30, 200, 3000))
                    n = rng.choice((1, 1, 1, 3))
                    stream = Stream(service, prompt(rng.randrange(50), length), rng.randrange(1, 90), n=n)
                    streams.append(stream)
                    if rng.random() < 0.3:
                        stream.begin()
                    if rng.random() < 0.4:
                        rng.choice(streams).abort()
                done += len(streams)
                if rng.random() < 0.5:
                    for stream in streams:
                        stream.wait()
        if not canary.is_done.is_set():
            canary.abort()
        eventually(lambda: steady.stats().result(DEADLINE_S)["num_running"] == 0, "requests run on")
        stats = steady.stats().result(DEADLINE_S)
        assert stats["num_free_pages"] == stats["num_pages"] and stats["num_doors"] == 1
        assert server._owners == {} and stats["num_dropped_frames"] == 0
        Stream(steady, prompt(2), 10).check()


def test_r34_random_aborts_and_disconnects_leak_nothing() -> None:
    storm(100, seed=1)


@pytest.mark.slow
def test_r34_a_thousand_random_aborts_and_disconnects_leak_nothing() -> None:
    storm(1000, seed=2)


RECEIVING_ROOMS = ("engine", "serve")
UNSAFE = ("pickle", "dill", "cloudpickle", "marshal", "shelve", "eval", "exec", "recv_pyobj", "send_pyobj")


def test_r63_no_receiving_room_can_turn_bytes_into_objects() -> None:
    seen = 0
    for room in RECEIVING_ROOMS:
        for path in (ROOT / "slipstream" / room).rglob("*.py"):
            seen += 1
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                words: list[str] = []
                if isinstance(node, ast.Import | ast.ImportFrom):
                    words = [part for alias in node.names for part in alias.name.split(".")]
                    words += (getattr(node, "module", None) or "").split(".")
                elif isinstance(node, ast.Call):
                    words = [getattr(node.func, "id", ""), getattr(node.func, "attr", "")]
                found = set(words) & set(UNSAFE)
                assert not found, f"{path.name}:{getattr(node, 'lineno', 0)}: {found}"
    assert seen > 30


def test_r64_sockets_are_for_this_user_alone(server: EngineServer, tmp_path: Path) -> None:
    for address in (server.endpoint.address, server.endpoint.heartbeat):
        folder = Path(address.removeprefix("ipc://")).parent
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    with serving(use_tcp=True) as other:
        assert other.endpoint.address.startswith("tcp://127.0.0.1:")
        assert other.endpoint.heartbeat.startswith("tcp://127.0.0.1:")
        assert len(other.endpoint.secret) == 64 and other.endpoint.secret != server.endpoint.secret
        assert other.endpoint.secret not in repr(other.endpoint)
    tmp_path.chmod(0o755)
    with pytest.raises(ConfigError, match="0700"):
        make_endpoint(tmp_path)
    with pytest.raises(ConfigError, match="too long for a unix socket"):
        make_endpoint(tmp_path / ("x" * 120))
