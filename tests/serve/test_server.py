"""Does a server listen while it loads, serve only after a token, drain, and end with its engine?

The engine runs in this process behind a host that loads, fails and dies when a test says so; the same over
real processes is in `test_live_server.py`.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from slipstream.core.errors import CheckpointError, EngineError
from slipstream.engine.config import EngineConfig
from slipstream.engine.health import Health
from slipstream.engine.service import EngineService, local_service
from slipstream.serve.listening import address_of, listen
from slipstream.serve.server import ApiServer
from slipstream.serve.settings import ApiKey, ServeSettings
from tests.engine.tiny import tiny_llama, write_folder
from tests.serve.live_server import wait_until
from tests.serve.oracle import DEADLINE_S

MODEL = "tiny"


class StagedHost:
    """An engine whose loading and failing follow a test."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.options: dict[str, Any] = {"device": "cpu", "dtype": "float32", "max_seq_len": 4096, **options}
        self.folder = folder
        self.may_load = threading.Event()
        self.error: BaseException | None = None
        self.service: EngineService | None = None
        self.health: Health | None = None
        self.is_over = False
        self.num_stops = 0

    def start(self, progress: Callable[[str, float], None]) -> EngineService:
        progress("reading weights", 0.5)
        if not self.may_load.wait(DEADLINE_S) or self.error is not None:
            raise self.error or TimeoutError
        self.service = local_service(EngineConfig(model=self.folder, **self.options))
        real = self.service.health
        self.service.health = lambda: self.health or real()  # type: ignore[method-assign]
        return self.service

    def has_ended(self) -> bool:
        return self.is_over

    def stop(self) -> None:
        self.num_stops += 1
        self.may_load.set()
        if self.service is not None:
            self.service.close()


class Run:
    """A server on a thread, its address and how it ended."""

    def __init__(self, host: StagedHost, settings: ServeSettings) -> None:
        self.host = host
        listening = listen(settings)
        self.url = address_of(listening, settings)
        self.server = ApiServer(settings, host, listening, model_names=(MODEL,))
        self.code: int | None = None
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()
        self.client = httpx.Client(base_url=self.url, timeout=DEADLINE_S)

    def _run(self) -> None:
        try:
            self.code = self.server.run()
        except BaseException as error:
            self.error = error

    def get(self, path: str) -> tuple[int, dict[str, Any]]:
        answer = self.client.get(path)
        return answer.status_code, answer.json()

    def wait_ready(self) -> Run:
        self.host.may_load.set()
        wait_until(lambda: self.get("/ready")[0] == 200)
        return self

    def end(self) -> int | None:
        self.thread.join(DEADLINE_S)
        assert not self.thread.is_alive()
        return self.code

    def complete(self, **changes: Any) -> httpx.Response:
        body = {"model": MODEL, "prompt": "ba de", "max_tokens": 4, "temperature": 0, "ignore_eos": True}
        return self.client.post("/v1/completions", json={**body, **changes})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tiny_llama(max_position_embeddings=4096), tmp_path_factory.mktemp("served"))


@contextlib.contextmanager
def running(folder: Path, *, max_batch_size: int = 64, **settings: Any) -> Iterator[Run]:
    run = Run(StagedHost(folder, max_batch_size=max_batch_size), ServeSettings(**{"port": 0, **settings}))
    try:
        yield run
    finally:
        run.client.close()
        for _ in range(2):
            run.server.stop()
        run.host.may_load.set()
        run.end()


def test_r37_it_listens_while_it_loads_and_is_ready_only_after_a_token(folder: Path) -> None:
    with running(folder) as run:
        wait_until(lambda: "reading weights" in run.get("/health")[1]["reason"])
        for path in ("/health", "/ready"):
            status, body = run.get(path)
            assert (status, body["status"]) == (503, "loading") and "50%" in body["reason"]
        refused = run.complete()
        assert refused.status_code == 503 and refused.headers["retry-after"]
        assert refused.json()["error"]["code"] == "loading"
        assert run.get("/version")[0] == 200
        run.wait_ready()
        assert run.host.service is not None and run.host.service.health().num_steps >= 1
        status, body = run.get("/health")
        assert (status, body["status"]) == (200, "ok")
        assert run.complete().status_code == 200
        assert run.get("/health_generate")[1]["status"] == "ok"


def test_r37_an_engine_that_does_not_load_ends_the_server_with_its_error(folder: Path) -> None:
    with running(folder) as run:
        run.host.error = CheckpointError("model.safetensors is cut off")
        run.host.may_load.set()
        run.end()
        assert run.code is None and run.error is run.host.error and run.host.num_stops == 1


def test_r37_an_engine_whose_first_token_fails_never_becomes_ready(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start_probe(service: EngineService) -> Any:
        raise EngineError("no token came")

    monkeypatch.setattr("slipstream.serve.server.start_probe", start_probe)
    with running(folder) as run:
        run.host.may_load.set()
        run.end()
        assert isinstance(run.error, EngineError)


def test_a_stop_while_it_loads_ends_it_at_once(folder: Path) -> None:
    with running(folder) as run:
        wait_until(lambda: run.get("/health")[0] == 503)
        run.server.stop()
        assert run.end() == 0 and run.host.num_stops == 1


def test_r47_a_stop_lets_streams_end_and_refuses_new_work(folder: Path) -> None:
    with running(folder, drain_timeout_s=DEADLINE_S) as run:
        run.wait_ready()
        texts: list[str] = []
        expected = run.complete(max_tokens=200).json()["choices"][0]["text"]
        body = {"model": MODEL, "prompt": "ba de", "max_tokens": 200, "temperature": 0, "ignore_eos": True}
        is_streaming = threading.Semaphore(0)

        def read() -> None:
            text = ""
            with httpx.stream(
                "POST", f"{run.url}/v1/completions", json={**body, "stream": True}, timeout=DEADLINE_S
            ) as answer:
                for line in answer.iter_lines():
                    if line.startswith("data: {"):
                        if not text:
                            is_streaming.release()
                        text += json.loads(line[6:])["choices"][0]["text"]
                    elif line == "data: [DONE]":
                        texts.append(text)

        readers = [threading.Thread(target=read, daemon=True) for _ in range(4)]
        for reader in readers:
            reader.start()
        for _ in range(4):
            assert is_streaming.acquire(timeout=DEADLINE_S)
        # Held until everything has been looked at, however fast the streams come to their ends.
        held = run.server.context.admission.admit("", num_requests=1, num_tokens=1)
        run.server.stop()
        wait_until(lambda: run.get("/ready")[0] == 503)
        status, health = run.get("/ready")
        assert (status, health["status"]) == (503, "draining")
        assert run.get("/health")[0] == 200, "a draining server is not to be restarted"
        refused = run.complete()
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "draining"
        assert refused.headers["retry-after"]
        held.release()
        for reader in readers:
            reader.join(DEADLINE_S)
        assert texts == [expected] * 4
        assert run.end() == 0


@pytest.mark.parametrize("is_hurried", [True, False])
def test_r47_a_second_stop_or_the_timeout_ends_streams(folder: Path, is_hurried: bool) -> None:
    with running(folder, drain_timeout_s=DEADLINE_S if is_hurried else 0.2) as run:
        run.wait_ready()
        body = {"model": MODEL, "prompt": "ba", "max_tokens": 4000, "ignore_eos": True, "stream": True}
        received = ""
        with run.client.stream("POST", "/v1/completions", json=body) as answer:
            lines = answer.iter_lines()
            next(lines)
            run.server.stop()
            if is_hurried:
                run.server.stop()
            with contextlib.suppress(httpx.HTTPError):
                received = "\n".join(lines)
        assert run.end() == 0
        # Cut short it may be, ended as if it were whole it is not.
        assert "[DONE]" not in received
        if not is_hurried:
            assert '"error"' in received


def test_r35_an_engine_that_ends_fails_what_it_ran_and_ends_the_server(folder: Path) -> None:
    with running(folder) as run:
        run.wait_ready()
        run.host.health = Health("stopped", "The engine's process was ended by SIGKILL.")
        wait_until(lambda: run.get("/health")[0] == 503)
        body = run.get("/health")[1]
        assert body == {"status": "stopped", "reason": "The engine's process was ended by SIGKILL."}
        assert run.get("/ready")[0] == 503
        wait_until(lambda: run.complete().status_code == 503)
        assert run.complete().json()["error"]["code"] == "engine_stopped"
        run.host.is_over = True
        assert run.end() == 1


def test_r36_a_stuck_engine_is_told_and_may_come_back(folder: Path) -> None:
    with running(folder) as run:
        run.wait_ready()
        run.host.health = Health("stuck", "A step has taken 130 s so far.")
        wait_until(lambda: run.get("/ready")[0] == 503)
        wait_until(lambda: run.complete().status_code == 503)
        assert run.get("/health")[1]["status"] == "stuck"
        run.host.health = None
        wait_until(lambda: run.get("/ready")[0] == 200)
        wait_until(lambda: run.complete().status_code == 200)


def test_r27_the_reason_of_a_failure_names_nothing_of_the_machine(folder: Path) -> None:
    with running(folder) as run:
        run.wait_ready()
        run.host.health = Health("stopped", "RuntimeError: /home/me/model.py at 0x7f00aa000000")
        wait_until(lambda: run.get("/health")[0] == 503)
        reason = run.get("/health")[1]["reason"]
        assert reason == "The engine has stopped. The server's log says why."


def test_r17_an_operator_puts_the_engine_to_sleep_and_wakes_it(folder: Path) -> None:
    keys = {"api_keys": (ApiKey("user", "user-key"),), "admin_keys": (ApiKey("root", "root-key"),)}
    with running(folder, **keys) as run:
        user, root = ({"Authorization": f"Bearer {key}"} for key in ("user-key", "root-key"))
        run.wait_ready()
        assert run.client.post("/sleep").status_code == 401
        assert run.client.post("/sleep", headers=user).status_code == 403
        assert run.client.post("/sleep?level=7", headers=root).status_code == 400
        assert run.client.post("/sleep", headers=root).json() == {"status": "ok"}
        assert (run.get("/health")[0], run.get("/ready")[1]["status"]) == (200, "asleep")
        body = {"model": MODEL, "prompt": "ba", "max_tokens": 2}
        asleep = run.client.post("/v1/completions", json=body, headers=user)
        assert (asleep.status_code, asleep.json()["error"]["code"]) == (503, "engine_asleep")
        assert run.client.post("/wake_up", headers=root).status_code == 200
        assert run.client.post("/reset_prefix_cache", headers=root).status_code == 200
        assert run.client.post("/v1/completions", json=body, headers=user).status_code == 200
        assert run.get("/ready")[0] == 200


def test_r71_a_full_server_says_when_to_come_again(folder: Path) -> None:
    with running(folder, max_queued_requests=0) as run:
        run.wait_ready()
        room = run.server.context.admission.bounds.max_requests
        held = run.server.context.admission.admit("", num_requests=room, num_tokens=1)
        refused = run.complete()
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
        assert int(refused.headers["retry-after"]) >= 1
        held.release()
        assert run.complete().status_code == 200


def test_r72_a_request_past_its_deadline_is_dropped_before_prefill(folder: Path) -> None:
    with running(folder, max_batch_size=1, request_timeout_s=DEADLINE_S, drain_timeout_s=0.0) as run:
        run.wait_ready()
        with httpx.Client(base_url=run.url, timeout=DEADLINE_S) as other:
            body = {"model": MODEL, "prompt": "ba", "max_tokens": 4000, "ignore_eos": True, "stream": True}
            with other.stream("POST", "/v1/completions", json=body) as busy:
                # Dropping the iterator would close the stream.
                lines = busy.iter_lines()
                next(lines)
                late = run.complete(prompt="zz zz zz", timeout=0.1)
                assert run.server.context.admission.num_requests == 1, "the engine is not busy any more"
                assert (late.status_code, late.json()["error"]["code"]) == (504, "timeout"), late.text
        service = run.host.service
        assert service is not None
        # The busy one's two tokens and the warm-up's one were queried; the late prompt of eight never was.
        assert service.stats().result(DEADLINE_S)["num_queried_tokens"] <= 3


def test_r03_the_real_server_has_the_guards(folder: Path) -> None:
    with running(folder, header_timeout_s=0.3, max_body_bytes=4096) as run:
        run.wait_ready()
        host, port = run.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=DEADLINE_S) as slow:
            slow.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: ")
            assert slow.recv(100).startswith(b"HTTP/1.1 408 ")
        assert run.client.get("/" + "a" * 9000).status_code == 414
        assert run.client.get("/", headers={"X-Big": "b" * 40_000}).status_code == 431
        assert run.complete(prompt="x" * 5000).status_code == 413
        assert run.client.get("/health", headers={"Host": "evil.example"}).status_code == 403


def test_r81_two_keys_share_a_busy_server(folder: Path) -> None:
    """The loud key's flood is cut to its share; the quiet one is served among it."""
    keys = (ApiKey("loud", "loud-key"), ApiKey("quiet", "quiet-key"))
    settings = {"api_keys": keys, "max_queued_requests": 6, "drain_timeout_s": 0.0}
    with running(folder, max_batch_size=2, **settings) as run:
        run.wait_ready()
        loud, quiet = ({"Authorization": f"Bearer {key}"} for key in ("loud-key", "quiet-key"))
        statuses: list[tuple[int, str]] = []
        body = {"model": MODEL, "prompt": "ba de", "max_tokens": 200, "ignore_eos": True}

        def flood() -> None:
            answer = httpx.post(f"{run.url}/v1/completions", json=body, headers=loud, timeout=DEADLINE_S)
            code = "" if answer.status_code == 200 else answer.json()["error"]["code"]
            statuses.append((answer.status_code, code))

        flooding = [threading.Thread(target=flood, daemon=True) for _ in range(24)]
        for thread in flooding:
            thread.start()
        wait_until(lambda: run.server.context.admission.num_refused > 0)
        few = {**body, "max_tokens": 2}
        for _ in range(3):
            assert run.client.post("/v1/completions", json=few, headers=quiet).status_code == 200
        for thread in flooding:
            thread.join(DEADLINE_S)
        refused = [code for status, code in statuses if status == 429]
        assert len(statuses) == 24 and {status for status, _ in statuses} == {200, 429}
        assert "key_share_exceeded" in refused and statuses.count((200, "")) >= 7


def test_it_speaks_tls(folder: Path, tmp_path: Path) -> None:
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    line = "req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=localhost -addext subjectAltName=IP:127.0.0.1"
    try:
        subprocess.run(
            ["openssl", *line.split(), "-keyout", key, "-out", certificate], check=True, capture_output=True
        )
    except FileNotFoundError:
        pytest.skip("openssl makes the certificate, and this machine has none")
    with running(folder, ssl_certfile=str(certificate), ssl_keyfile=str(key)) as run:
        run.client = httpx.Client(base_url=run.url, verify=str(certificate), timeout=DEADLINE_S)
        assert run.url.startswith("https://")
        run.wait_ready()
        assert run.complete().status_code == 200
        assert len(run.complete(stream=True, max_tokens=50).text.split("data: ")) > 20
        assert run.client.get("/" + "a" * 9000).status_code == 414


def test_a_server_that_cannot_answer_does_not_live_on(folder: Path) -> None:
    with listen(ServeSettings(port=0)) as listening:
        settings = ServeSettings(ssl_certfile="none.pem", ssl_keyfile="none.pem")
        host = StagedHost(folder)
        server = ApiServer(settings, host, listening, model_names=(MODEL,))
        with pytest.raises(FileNotFoundError):
            server.run()
        assert host.num_stops == 1


def test_r48_signals_are_handled_while_it_runs_and_put_back(folder: Path) -> None:
    """In the main thread, as its process runs it; SIGTERM then ends it in order."""
    if threading.current_thread() is not threading.main_thread():
        pytest.skip("only a main thread handles signals")
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    during: list[Any] = []
    settings = ServeSettings(port=0)
    host = StagedHost(folder)
    host.may_load.set()
    with listen(settings) as listening:
        server = ApiServer(settings, host, listening, model_names=(MODEL,), on_ready=lambda info: ready.set())
        ready = threading.Event()

        def end() -> None:
            if ready.wait(DEADLINE_S):
                during.extend(signal.getsignal(number) for number in numbers)
                os.kill(os.getpid(), signal.SIGTERM)

        thread = threading.Thread(target=end, daemon=True)
        thread.start()
        assert server.run() == 0
        thread.join(DEADLINE_S)
    assert during[:2] != before[:2] and during[2:] == before[2:]
    assert [signal.getsignal(number) for number in numbers] == before
