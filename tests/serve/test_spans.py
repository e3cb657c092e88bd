"""Does a request leave one span with its timings, in the trace its client began, and none of its text?"""

from __future__ import annotations

import socket
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from slipstream.core.errors import ConfigError, MissingExtraError
from slipstream.core.outputs import CompletionOutput, RequestMetrics, RequestOutput
from slipstream.serve.request_facts import RequestFacts, current_facts
from slipstream.serve.request_log import RequestLog
from slipstream.serve.spans import FLUSH_S, Spans, open_spans

pytest.importorskip("opentelemetry.sdk.trace", reason="needs the extra otel")

from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

TRACE_ID, PARENT_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def spans(exporter: InMemorySpanExporter) -> Iterator[Spans]:
    spans = Spans(SimpleSpanProcessor(exporter), model="served")
    yield spans
    spans.close()


def an_output() -> RequestOutput:
    metrics = RequestMetrics(10.0, 10.5, 13.0, 10.25, 12.5, num_output_tokens=3)
    sample = CompletionOutput(0, text="secret answer", finish_reason="length")
    return RequestOutput(
        "r", "secret prompt", [5, 6], [sample], finished=True, num_cached_tokens=1, metrics=metrics
    )


def site(spans: Spans) -> TestClient:
    app = FastAPI()

    @app.post("/v1/chat/{name}")
    async def chat(name: str) -> str:
        facts = current_facts()
        assert facts is not None
        facts.take(an_output())
        return name

    @app.get("/boom")
    async def boom() -> None:
        raise RuntimeError("secret")

    context: Any = SimpleNamespace(settings=SimpleNamespace(log_requests=False), metrics=None)
    return TestClient(RequestLog(app, context=context, spans=spans), raise_server_exceptions=False)


def test_one_span_a_request(spans: Spans, exporter: InMemorySpanExporter) -> None:
    headers = {
        "traceparent": f"00-{TRACE_ID}-{PARENT_ID}-01",
        "tracestate": "vendor=1",
        "x-request-id": "job-1",
    }
    site(spans).post("/v1/chat/x?key=secret", headers=headers)
    (span,) = exporter.get_finished_spans()
    assert (span.name, span.kind) == ("POST /v1/chat/{name}", SpanKind.SERVER)
    assert span.parent is not None
    assert (f"{span.context.trace_id:032x}", f"{span.parent.span_id:016x}") == (TRACE_ID, PARENT_ID)
    assert span.context.trace_state.get("vendor") == "1"
    assert dict(span.attributes or {}) == {
        "http.request.method": "POST",
        "http.response.status_code": 200,
        "http.route": "/v1/chat/{name}",
        "gen_ai.request.id": "job-1",
        "gen_ai.usage.cache_read.input_tokens": 1,
        "gen_ai.request.model": "served",
        "gen_ai.usage.input_tokens": 2,
        "gen_ai.usage.output_tokens": 3,
        "gen_ai.response.finish_reasons": ("length",),
        "gen_ai.latency.time_in_queue": 0.25,
        "gen_ai.latency.time_in_model_prefill": 0.25,
        "gen_ai.latency.time_in_model_decode": 2.0,
        "gen_ai.latency.time_to_first_token": 0.5,
        "gen_ai.latency.e2e": 3.0,
    }
    assert span.start_time and span.end_time and span.start_time < span.end_time < span.start_time + 60e9
    assert span.resource.attributes["service.name"] == "slipstream"
    assert "secret" not in span.to_json()


@pytest.mark.parametrize("header", ["", "x", "00-0-0-01", f"00-{'0' * 32}-{PARENT_ID}-01", "é" * 600])
def test_a_broken_parent_starts_a_trace(header: str, spans: Spans, exporter: InMemorySpanExporter) -> None:
    site(spans).post("/v1/chat/x", headers={"traceparent": header.encode("latin-1")})
    (span,) = exporter.get_finished_spans()
    assert span.parent is None and span.context.trace_id


def test_a_failure_of_ours_is_an_error(spans: Spans, exporter: InMemorySpanExporter) -> None:
    client = site(spans)
    client.get("/boom")
    client.get("/nowhere")
    failed, missing = exporter.get_finished_spans()
    assert failed.status.status_code is StatusCode.ERROR
    assert (missing.name, missing.status.status_code) == ("GET", StatusCode.UNSET)
    assert "http.route" not in dict(missing.attributes or {})


def test_spans_reach_a_collector() -> None:
    """Over the wire, as OTLP, to the path that a bare address stands for."""
    received: list[tuple[str, bytes]] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append((self.path, self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            return

    server = HTTPServer(("127.0.0.1", 0), Collector)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        spans = open_spans(f"http://127.0.0.1:{server.server_port}", model="served")
        spans.record(RequestFacts("job-7", "GET", "/health"))
        spans.close()
    finally:
        server.shutdown()
        server.server_close()
    assert [path for path, _ in received] == ["/v1/traces"]
    assert b"job-7" in received[0][1]


def test_a_collector_that_does_not_answer_holds_nobody_up() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        spans = open_spans(f"http://127.0.0.1:{silent.getsockname()[1]}", model="served")
        spans.record(RequestFacts("job-8", "GET", "/health"))
        before = time.monotonic()
        spans.close()
        # By itself the exporter waits for ten seconds.
        assert time.monotonic() - before < FLUSH_S + 4.0


@pytest.mark.parametrize("endpoint", ["", "collector:4317", "grpc://host:4317", "http://", "file:///etc/x"])
def test_an_endpoint_that_is_none_is_refused(endpoint: str) -> None:
    with pytest.raises(ConfigError, match="otlp_traces_endpoint"):
        open_spans(endpoint, model="m")


def test_without_the_extra_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(MissingExtraError, match=r"slipstream-llm\[otel\]"):
        open_spans("http://127.0.0.1:4318", model="m")
