"""What do tests of the endpoints talk to? The application over real sockets, in a thread, with any engine."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import uvicorn

from slipstream.engine.config import EngineConfig
from slipstream.engine.service import EngineService, local_service
from slipstream.serve.admission import Admission, Bounds
from slipstream.serve.app import create_app
from slipstream.serve.context import ServeContext
from slipstream.serve.settings import ServeSettings
from tests.serve.sse_protocol import read_events

DEADLINE_S = 60.0
MODEL = "tiny"
ROOM = Bounds(max_requests=4096, max_tokens=1 << 20, queued_requests=4096, queued_tokens=1 << 20)


class RunningServer:
    """An application that listens, and a client of it."""

    def __init__(self, context: ServeContext, service: EngineService, port: int) -> None:
        self.context = context
        self.service = service
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.client = httpx.Client(base_url=self.url, timeout=DEADLINE_S)

    def post(self, path: str, **body: Any) -> httpx.Response:
        return self.client.post(path, json=body)

    def ok(self, path: str, **body: Any) -> Any:
        answer = self.post(path, **body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def events(self, path: str, **body: Any) -> list[Any]:
        """Return the events of a stream, checked against the protocol, without the end mark."""
        answer = self.post(path, stream=True, **body)
        assert answer.status_code == 200, answer.text
        assert answer.headers["content-type"].startswith("text/event-stream")
        return read_events(answer.text, num_choices=num_choices(body), has_usage=wants_usage(body))

    def refusal(self, path: str, **body: Any) -> dict[str, Any]:
        """Return the error of a body that must be refused."""
        answer = self.post(path, **body)
        assert 400 <= answer.status_code < 500, answer.text
        return checked_error(answer)

    def wait_idle(self) -> None:
        """Wait until the engine has nothing to do and every page and place in the queue is free again."""
        deadline = time.monotonic() + DEADLINE_S
        while True:
            stats = self.service.stats().result(DEADLINE_S)
            admission = self.context.admission
            if not stats["num_running"] and not stats["num_waiting"] and not admission.num_requests:
                break
            assert time.monotonic() < deadline, stats
            time.sleep(0.01)
        assert stats["num_free_pages"] == stats["num_pages"], stats
        assert admission.num_tokens == 0


def checked_error(answer: httpx.Response) -> dict[str, Any]:
    """Assert the one shape of failures, and that nothing of the inside shows."""
    assert answer.headers["content-type"] == "application/json", answer.text
    body = answer.json()
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}, body
    error = body["error"]
    assert isinstance(error["message"], str) and error["message"]
    assert isinstance(error["type"], str)
    assert error["code"] is None or isinstance(error["code"], str)
    for leak in ("Traceback", "0x7", "/work", "site-packages", ".py"):
        assert leak not in answer.text, answer.text
    assert len(answer.text) < 4000
    return error


def num_choices(body: dict[str, Any]) -> int:
    prompt = body.get("prompt")
    is_many = isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list)
    return (len(prompt) if is_many and prompt is not None else 1) * body.get("n", 1)


def wants_usage(body: dict[str, Any]) -> bool:
    return bool((body.get("stream_options") or {}).get("include_usage"))


@contextlib.contextmanager
def serving(
    service: EngineService, *, settings: ServeSettings | None = None, bounds: Bounds = ROOM
) -> Iterator[RunningServer]:
    """Serve an engine on a free port of the loopback interface until the block ends."""
    context = ServeContext(
        settings=settings or ServeSettings(), model_names=(MODEL,), admission=Admission(bounds)
    )
    context.attach(service)
    server = uvicorn.Server(
        uvicorn.Config(create_app(context), host="127.0.0.1", port=0, log_level="warning", loop="asyncio")
    )
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        deadline = time.monotonic() + DEADLINE_S
        while not server.started:
            assert time.monotonic() < deadline and thread.is_alive(), "the server does not start"
            time.sleep(0.005)
        port = server.servers[0].sockets[0].getsockname()[1]
        running = RunningServer(context, service, port)
        with running.client:
            yield running
    finally:
        server.should_exit = True
        thread.join(DEADLINE_S)


@contextlib.contextmanager
def serving_folder(folder: Path, **options: Any) -> Iterator[RunningServer]:
    """Serve a model folder from this process."""
    chosen = {"device": "cpu", "dtype": "float32", "max_seq_len": 256, **options}
    service = local_service(EngineConfig(model=folder, **chosen))
    try:
        with serving(service) as server:
            yield server
    finally:
        service.close()
