"""Is every request named, counted and logged once, and can nothing that a client sends forge a line?"""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI, Request
from fastapi.testclient import TestClient
from starlette.responses import StreamingResponse

from slipstream.core.log_lines import LOGGERS
from slipstream.core.outputs import CompletionOutput, RequestMetrics, RequestOutput
from slipstream.serve.log_format import configure_server_log
from slipstream.serve.request_facts import RequestFacts, current_facts
from slipstream.serve.request_ids import request_id_of
from slipstream.serve.request_log import RequestLog, log_entry

SECRET_PROMPT = "the launch code\nERROR slipstream forged line\x1b[2J\u202e"
KEY = "sk-very-secret"


class CountingMetrics:
    def __init__(self) -> None:
        self.seen: list[tuple[str, int]] = []

    def count_http(self, scope: Any, status: int) -> None:
        self.seen.append((getattr(scope.get("route"), "path", "unmatched"), status))


def an_output() -> RequestOutput:
    metrics = RequestMetrics(10.0, 10.5, 13.0, 10.25, 12.5, num_output_tokens=3)
    samples = [CompletionOutput(0, text="a secret answer", finish_reason="stop")]
    return RequestOutput(
        "r", SECRET_PROMPT, [5, 6], samples, finished=True, num_cached_tokens=1, metrics=metrics
    )


def an_app() -> FastAPI:
    app = FastAPI()

    @app.post("/v1/echo/{name}")
    async def echo(name: str, request: Request) -> str:
        facts = current_facts()
        assert facts is not None
        facts.take(an_output())
        logging.getLogger("slipstream.serve.test").warning("working on it")
        return request_id_of(request.scope)

    @app.get("/stream")
    async def stream() -> StreamingResponse:
        async def pieces() -> Any:
            yield b"one"
            yield b"two"

        return StreamingResponse(pieces())

    @app.get("/boom")
    async def boom() -> None:
        try:
            raise ValueError("bad\nthing")
        except ValueError:
            logging.getLogger("slipstream.serve.test").exception("it failed")
        raise RuntimeError("not told")

    return app


class Site:
    """An application behind the log, and what the log said."""

    def __init__(self, *, as_json: bool, log_requests: bool = True) -> None:
        self.metrics = CountingMetrics()
        settings = SimpleNamespace(log_requests=log_requests)
        context: Any = SimpleNamespace(settings=settings, metrics=self.metrics)
        configure_server_log(as_json=as_json)
        self.stream = io.StringIO()
        for handler in logging.getLogger("slipstream").handlers:
            handler.setStream(self.stream)  # type: ignore[attr-defined]
        self.client = TestClient(RequestLog(an_app(), context=context), raise_server_exceptions=False)

    @property
    def lines(self) -> list[str]:
        return self.stream.getvalue().split("\n")[:-1]


@pytest.fixture(autouse=True)
def keep_logging(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("SLIPSTREAM_LOG", raising=False)
    names = (*LOGGERS, "slipstream.serve.request_log")
    loggers = [logging.getLogger(name) for name in names]
    before = [(logger.handlers, logger.level, logger.propagate) for logger in loggers]
    yield
    for logger, (handlers, level, propagate) in zip(loggers, before, strict=True):
        logger.handlers, logger.level, logger.propagate = handlers, level, propagate


def test_a_usable_id_is_taken_and_returned() -> None:
    client = Site(as_json=True).client
    answer = client.post("/v1/echo/x", headers={"x-request-id": "Job_7.a:b-c"})
    assert answer.headers["x-request-id"] == answer.json() == "Job_7.a:b-c"


@pytest.mark.parametrize("given", ["", " ", "-x", "a b", "a\x7f", "é", "x" * 129, "a/b", '"', "${jndi}"])
def test_r80_an_unusable_id_is_replaced(given: str) -> None:
    client = Site(as_json=True).client
    answer = client.post("/v1/echo/x", headers={"x-request-id": given.encode("latin-1")})
    assert answer.headers["x-request-id"] == answer.json() != given
    assert len(answer.json()) == 32


def test_every_answer_has_an_id_and_is_counted_once() -> None:
    site = Site(as_json=True)
    ids = set()
    for method, path in [
        ("POST", "/v1/echo/x"),
        ("GET", "/stream"),
        ("GET", "/nowhere"),
        ("GET", "/v1/echo/x"),
    ]:
        ids.add(site.client.request(method, path).headers["x-request-id"])
    assert len(ids) == 4
    site.client.get("/boom")
    expected = [("/v1/echo/{name}", 200), ("/stream", 200), ("unmatched", 404), ("/v1/echo/{name}", 405)]
    assert site.metrics.seen == [*expected, ("/boom", 500)]


def test_a_json_line_holds_the_figures_and_no_text() -> None:
    site = Site(as_json=True)
    site.client.post(
        "/v1/echo/x?api_key=" + KEY,
        json={"prompt": SECRET_PROMPT},
        headers={"Authorization": f"Bearer {KEY}", "x-request-id": "job-1"},
    )
    warned, entry = (json.loads(line) for line in site.lines)
    assert warned["request_id"] == entry["request_id"] == "job-1"
    assert warned["logger"] == "slipstream.serve.test" and warned["level"] == "warning"
    assert (entry["method"], entry["path"], entry["status"]) == ("POST", "/v1/echo/x", 200)
    assert (entry["prompt_tokens"], entry["cached_tokens"], entry["output_tokens"]) == (2, 1, 3)
    assert entry["finish_reasons"] == ["stop"]
    times = [entry[name] for name in ("queue_s", "prefill_s", "ttft_s", "decode_s")]
    assert times == [0.25, 0.25, 0.5, 2.0] and 0 < entry["duration_s"] < 60


@pytest.mark.parametrize("as_json", [True, False])
def test_r80_nothing_a_client_sends_is_logged_or_forges_a_line(as_json: bool) -> None:
    site = Site(as_json=as_json)
    hostile = "/nowhere/a%0AERROR%20slipstream%20forged%0D%1b%5b2J%e2%80%ae%c2%85%00"
    site.client.get(hostile, headers={"Authorization": f"Bearer {KEY}", "user-agent": "x\x0bforged"})
    site.client.post("/v1/echo/x", json={"prompt": SECRET_PROMPT}, headers={"x-api-key": KEY})
    text = site.stream.getvalue()
    assert KEY not in text and "launch" not in text and "secret" not in text
    assert len(site.lines) == 3
    assert not any(
        ord(char) < 32 or 127 <= ord(char) < 160 or ord(char) == 0x202E for char in text.replace("\n", "")
    )
    assert all(json.loads(line) for line in site.lines) if as_json else "\\nERROR slipstream forged" in text


@pytest.mark.parametrize("as_json", [True, False])
@pytest.mark.parametrize("level", ["warning", "debug"])
def test_an_exception_stays_one_record(as_json: bool, level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIPSTREAM_LOG", level)
    site = Site(as_json=as_json, log_requests=False)
    site.client.get("/boom")
    if as_json:
        (entry,) = (json.loads(line) for line in site.lines)
        assert entry["error"] == "ValueError: bad\\nthing"
        assert ("Traceback" in entry.get("traceback", "")) is (level == "debug")
        return
    first, *rest = site.lines
    assert "it failed" in first
    if level == "debug":
        assert len(rest) > 2 and all(line.startswith("  | ") for line in rest)
    else:
        assert not rest and first.endswith("it failed: ValueError: bad\\nthing")


def test_requests_are_logged_only_when_asked_for() -> None:
    site = Site(as_json=True, log_requests=False)
    site.client.get("/nowhere")
    assert site.lines == [] and site.metrics.seen == [("unmatched", 404)]


def test_a_plain_line_reads_well() -> None:
    site = Site(as_json=False)
    site.client.post("/v1/echo/x", headers={"x-request-id": "job-1"})
    warned, said = site.lines
    assert warned.endswith(" WARNING slipstream.serve.test [job-1] working on it")
    assert " INFO slipstream.serve.request_log [job-1] POST /v1/echo/x 200 in 0." in said


def test_a_client_that_leaves_counts_as_such() -> None:
    """The application ends without an answer, as it does where nobody is there to take it."""
    seen = CountingMetrics()
    context: Any = SimpleNamespace(settings=SimpleNamespace(log_requests=False), metrics=seen)

    async def silent(scope: Any, receive: Any, send: Any) -> None:
        return None

    log = RequestLog(silent, context=context)
    scope: Any = {"type": "http", "method": "GET", "path": "/x", "headers": []}
    with pytest.raises(StopIteration):
        log(scope, None, None).send(None)  # type: ignore[arg-type, attr-defined]
    assert seen.seen == [("unmatched", 499)]
    assert current_facts() is None


def test_facts_without_an_output_have_no_figures() -> None:
    entry = log_entry(RequestFacts("id", "GET", "/health"))
    assert "prompt_tokens" not in entry and "ttft_s" not in entry
