"""Does `slipstream serve` keep its promises as processes? Started as people do, killed as machines do."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.bench.tiny_checkpoint import write_checkpoint
from tests.serve.live_server import ROOT, LiveServer, live, running, statuses, wait_until
from tests.serve.oracle import DEADLINE_S, MAX_GROWTH_BYTES, MAX_POOL_THREADS, Oracle, Target, tree_of
from tests.serve.rough_clients import run_rough

ENGINE, WORKER = "slipstream.engine.engine_child", "slipstream.serve.api_worker"
KEY = "secret-of-a-client"
# Room for a stream that outlasts any test.
LONG = ("--max-seq-len", "16k", "--kv-cache-max-tokens", "32k")
# A fault has to show by then.
FAULT_S = 5.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("served") / "tiny")


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[LiveServer]:
    """One server for what leaves it as it was."""
    with live(model, *LONG, env={"SLIPSTREAM_API_KEY": KEY}) as server:
        yield server.wait_ready()


def headers() -> dict[str, str]:
    return {"Authorization": f"Bearer {KEY}"}


def stream_until_it_ends(
    server: LiveServer, ended: list[tuple[float, str]], **options: Any
) -> threading.Thread:
    """Read a stream that outlasts any test; note when and how it ended. Returns once it has begun."""
    has_begun = threading.Event()

    def read() -> None:
        body = {"model": "tiny", "prompt": "ab", "max_tokens": 16_000, "ignore_eos": True, "stream": True}
        text = ""
        try:
            with httpx.stream(
                "POST", f"{server.url}/v1/completions", json=body, timeout=DEADLINE_S, **options
            ) as answer:
                for line in answer.iter_lines():
                    text += line + "\n"
                    if line.startswith("data: "):
                        has_begun.set()
        except httpx.HTTPError as error:
            text += f"{type(error).__name__}"
        ended.append((time.monotonic(), text))

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    assert has_begun.wait(DEADLINE_S), ended
    return thread


def wait_all_ready(server: LiveServer) -> None:
    """Wait until whoever takes a connection is ready, and no process grows any more: it is still starting."""
    sizes: list[int] = []

    def is_settled() -> bool:
        time.sleep(0.5)
        sizes.append(sum(psutil.Process(pid).num_fds() for pid in tree_of(server.process.pid)))
        is_ready = all(server.get("/ready").status_code == 200 for _ in range(12))
        return is_ready and len(set(sizes[-4:])) == 1 and len(sizes) >= 4

    wait_until(is_settled, timeout_s=2 * DEADLINE_S)


def test_r28_a_default_start_is_for_this_machine_alone(server: LiveServer) -> None:
    listening = {
        connection.laddr.ip
        for pid in {
            server.process.pid,
            *(child.pid for child in psutil.Process(server.process.pid).children()),
        }
        for connection in psutil.Process(pid).net_connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert listening == {"127.0.0.1"}, "one port for clients, and none inside"
    assert statuses(server, ["/health", "/ready", "/docs", "/v1/models"]) == {
        "/health": 200,
        "/ready": 200,
        "/docs": 401,
        "/v1/models": 401,
    }


def test_it_says_what_is_served_and_how_to_try_it(server: LiveServer) -> None:
    said = "\n".join(server.lines)
    assert f"serving tiny at {server.url}" in said
    assert f"curl {server.url}/v1/chat/completions" in said and "$SLIPSTREAM_API_KEY" in said
    assert KEY not in said, "a key is never shown"
    command = next(line for line in server.lines if "curl " in line).removeprefix("or: ")
    done = subprocess.run(
        ["sh", "-c", command], env={**os.environ, "SLIPSTREAM_API_KEY": KEY}, capture_output=True, timeout=60
    )
    assert b'"chat.completion"' in done.stdout, done


def test_bad_requests_leave_real_processes_as_they_were(server: LiveServer) -> None:
    oracle = Oracle(server.target(model="tiny", headers=headers(), secrets=[KEY]))
    with oracle.watching(), oracle.client() as client:
        oracle.check(client.post("/v1/completions", json=oracle.body("x", n=10**9)), status=400)
        oracle.check(client.post("/v1/completions", json=oracle.body([7] * 20_000)), status=400)
        oracle.check(client.post("/v1/completions", content=b"x" * (17 << 20)), status=413)
        oracle.check(client.post("/v1/completions/", json=oracle.body("x")), status=404)
        oracle.check(httpx.post(f"{server.url}/v1/completions", json={}), status=401)


def test_r79_a_port_in_use_is_one_line_and_nothing_is_started(server: LiveServer, model: Path) -> None:
    port = server.url.rpartition(":")[2]
    done = start(model, "--port", port)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        f"Error: Port {port} of 127.0.0.1 is in use; choose another with --port, or 0 for any free one."
    ]
    assert server.get("/health").status_code == 200


def start(*arguments: Any) -> subprocess.CompletedProcess[str]:
    """Run a server that cannot start, to its end."""
    return subprocess.run(
        [sys.executable, "-m", "slipstream", "serve", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=DEADLINE_S * 2,
    )


@pytest.mark.slow
def test_r79_a_model_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    done = start(tmp_path / "none", "--port", "0", "--device", "cpu")
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1 and "none" in errors[0], done.stderr
    assert "Traceback" not in done.stderr


def test_r35_a_killed_engine_fails_what_runs_and_ends_the_server(model: Path) -> None:
    with live(model, *LONG) as server:
        server.wait_ready()
        ended: list[tuple[float, str]] = []
        reader = stream_until_it_ends(server, ended)
        killed = time.monotonic()
        server.child(ENGINE).kill()
        wait_until(lambda: statuses_of_dying(server) in (503, 0), timeout_s=FAULT_S)
        reader.join(FAULT_S)
        assert ended and ended[0][0] - killed < FAULT_S, "what runs fails within seconds"
        assert "[DONE]" not in ended[0][1]
        assert server.wait_end(timeout_s=4 * FAULT_S) == 1, "never limbo"
        server.assert_nothing_left()


def test_r38_a_server_that_is_killed_while_it_loads_takes_its_engine_along(model: Path) -> None:
    with live(model) as server:
        server.wait_line("listening at")
        wait_until(lambda: running(ENGINE, server.process.pid))
        server.remember()
        server.process.kill()
        server.assert_nothing_left()


def statuses_of_dying(server: LiveServer) -> int:
    try:
        return server.get("/health").status_code
    except httpx.HTTPError:
        return 0


def soak(server: LiveServer, target: Target, *, seconds: float, rounds: int) -> None:
    """Let rough clients come for some rounds; the footprint after each must not climb."""
    oracle = Oracle(target)
    prints = []
    for number in range(rounds):
        assert run_rough(target, seconds=seconds / rounds, seed=number) > 0
        oracle.wait_idle()
        with oracle.client() as client:
            oracle.check_canary(client)
        prints.append(oracle.footprint())
    # What is made once (pools, arenas, caches) is there after the first round.
    first, last = prints[0], prints[-1]
    assert last.pids == first.pids and last.num_segments <= first.num_segments
    wait_until(lambda: oracle.footprint().num_files <= first.num_files, what=f"{prints}")
    assert last.num_threads <= first.num_threads + MAX_POOL_THREADS, prints
    assert last.resident - first.resident < MAX_GROWTH_BYTES, prints


def test_r77_a_short_day_with_rough_clients_leaves_nothing_behind(server: LiveServer) -> None:
    soak(server, server.target(model="tiny", headers=headers()), seconds=6.0, rounds=3)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_r77_ten_minutes_with_rough_clients_have_no_slope(model: Path) -> None:
    with live(model, *LONG) as server:
        server.wait_ready()
        soak(server, server.target(model="tiny"), seconds=600.0, rounds=10)


def test_r47_sigterm_drains_and_exits_zero(server: LiveServer) -> None:
    """Runs last of those that share the server: it ends it."""
    ended: list[tuple[float, str]] = []
    reader = stream_until_it_ends(server, ended, headers=headers())
    server.process.send_signal(signal.SIGTERM)
    wait_until(lambda: server.get("/ready").status_code == 503, timeout_s=FAULT_S)
    body = {"model": "tiny", "prompt": "ab", "max_tokens": 1}
    refused = httpx.post(f"{server.url}/v1/completions", json=body, headers=headers(), timeout=DEADLINE_S)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
    assert not ended, "what is under way goes on"
    server.process.send_signal(signal.SIGTERM)
    assert server.wait_end() == 0
    reader.join(DEADLINE_S)
    assert "[DONE]" not in ended[0][1]
    server.assert_nothing_left()


@pytest.mark.slow
def test_r36_a_stopped_engine_is_seen_and_ended(model: Path) -> None:
    with live(model) as server:
        server.wait_ready()
        server.child(ENGINE).suspend()
        stopped = time.monotonic()
        wait_until(lambda: statuses_of_dying(server) == 503, timeout_s=2 * FAULT_S)
        assert time.monotonic() - stopped < 2 * FAULT_S
        assert server.get("/health").json()["status"] == "stuck"
        assert server.wait_end() == 1
        server.assert_nothing_left()


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["1", "2"])
def test_r35_with_restart_a_killed_engine_comes_back(model: Path, workers: str) -> None:
    options = ("--on-engine-failure", "restart", "--api-workers", workers)
    with live(model, *options) as server:
        server.wait_ready()
        oracle = Oracle(server.target(model="tiny"))
        before = server.child(ENGINE)
        before.kill()
        wait_until(lambda: server.get("/ready").status_code == 503)
        wait_all_ready(server)
        with oracle.client() as client:
            oracle.check_canary(client)
        assert server.child(ENGINE).pid != before.pid
        server.process.send_signal(signal.SIGTERM)
        assert server.wait_end() == 0
        server.assert_nothing_left()


@pytest.mark.slow
def test_r35_a_killed_api_worker_is_replaced(model: Path) -> None:
    with live(model, "--api-workers", "2") as server:
        server.wait_ready()
        before = server.child(WORKER)
        before.kill()
        wait_until(lambda: before.pid not in {child.pid for child in running(WORKER, server.process.pid)})
        wait_until(lambda: len(running(WORKER, server.process.pid)) == 2)
        wait_all_ready(server)
        oracle = Oracle(server.target(model="tiny"))
        with oracle.watching(max_growth=1 << 30):
            pass
        server.process.send_signal(signal.SIGTERM)
        assert server.wait_end() == 0
        server.assert_nothing_left()


@pytest.mark.slow
def test_r47_several_workers_drain_too(model: Path) -> None:
    with live(model, "--api-workers", "2", *LONG, "--drain-timeout", "1s") as server:
        server.wait_ready()
        ended: list[tuple[float, str]] = []
        readers = [stream_until_it_ends(server, ended) for _ in range(4)]
        server.process.send_signal(signal.SIGINT)
        assert server.wait_end() == 0
        for reader in readers:
            reader.join(DEADLINE_S)
        assert len(ended) == 4
        server.assert_nothing_left()


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["1", "2"])
def test_r38_a_killed_server_takes_all_its_processes_along(model: Path, workers: str) -> None:
    with live(model, "--api-workers", workers) as server:
        server.wait_ready()
        server.process.kill()
        server.assert_nothing_left()


@pytest.mark.slow
def test_several_engines_serve_as_one(model: Path) -> None:
    with live(model, "--num-engines", "2") as server:
        server.wait_ready()
        oracle = Oracle(server.target(model="tiny"))
        with oracle.watching():
            pass
        # One of two that dies fails its own requests alone; the server goes on.
        server.child(ENGINE).kill()
        with oracle.client() as client:
            wait_until(lambda: client.post("/v1/completions", json=oracle.body("x")).status_code == 200)
            oracle.check_canary(client)


@pytest.mark.slow
def test_a_unix_socket_is_for_its_owner(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "http.sock"
    with live(model, "--uds", str(path)) as server:
        server.wait_line("^serving ")
        assert path.stat().st_mode & 0o777 == 0o600
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), base_url="http://server") as client:
            assert client.get("/health").status_code == 200
        server.process.send_signal(signal.SIGTERM)
        assert server.wait_end() == 0
    assert not path.exists()


def test_r79_a_unix_socket_that_is_in_use_is_left_alone(tmp_path: Path, model: Path) -> None:
    path = tmp_path / "http.sock"
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        other.listen()
        done = start(model, "--uds", path)
        assert done.returncode == 1 and "another server listens there" in done.stderr
        assert path.exists()
