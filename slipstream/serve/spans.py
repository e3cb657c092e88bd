"""Which OpenTelemetry span does a request leave? One, made when it ends, in the trace its client began.

Needs the extra `otel`, which is imported only where an endpoint is given. Attribute names are those of
OpenTelemetry's semantic conventions for HTTP and for generative AI; the `gen_ai.latency.*` ones are what
other engines export. Text never leaves in a span.
"""

from __future__ import annotations

import threading
from typing import Any
from urllib.parse import urlsplit

from slipstream import __version__
from slipstream.core.errors import ConfigError, MissingExtraError
from slipstream.serve.request_facts import RequestFacts

SERVICE_NAME = "slipstream"
# What a collector that does not answer may hold up the end of a server.
FLUSH_S = 2.0
# Attribute -> time of RequestMetrics.
LATENCIES = {
    "gen_ai.latency.time_in_queue": "queue_s",
    "gen_ai.latency.time_in_model_prefill": "prefill_s",
    "gen_ai.latency.time_in_model_decode": "decode_s",
    "gen_ai.latency.time_to_first_token": "ttft_s",
    "gen_ai.latency.e2e": "e2e_s",
}


class Spans:
    """Makes spans with an exporter; `close` sends what is left."""

    def __init__(self, processor: Any, *, model: str) -> None:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        resource = Resource.create({"service.name": SERVICE_NAME, "service.version": __version__})
        # A provider of its own: the process's global one belongs to whoever embeds this server.
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer(SERVICE_NAME, __version__)
        self._propagator = TraceContextTextMapPropagator()
        self._model = model

    def record(self, facts: RequestFacts) -> None:
        """Make the span of a request that is over. Sending it is another thread's work."""
        from opentelemetry.trace import SpanKind, Status, StatusCode

        carrier = {"traceparent": facts.traceparent, "tracestate": facts.tracestate}
        span = self._tracer.start_span(
            f"{facts.method} {facts.route}".rstrip(),
            context=self._propagator.extract({name: value for name, value in carrier.items() if value}),
            kind=SpanKind.SERVER,
            start_time=facts.wall_ns,
            attributes=self._attributes(facts),
        )
        if facts.status >= 500:
            span.set_status(Status(StatusCode.ERROR))
        span.end(end_time=facts.wall_ns + int(facts.duration_s * 1e9))

    def _attributes(self, facts: RequestFacts) -> dict[str, Any]:
        found: dict[str, Any] = {
            "http.request.method": facts.method,
            "http.response.status_code": facts.status,
            "gen_ai.request.id": facts.request_id,
        }
        if facts.route:
            found["http.route"] = facts.route
        if not facts.outputs:
            return found
        found |= {
            "gen_ai.request.model": self._model,
            "gen_ai.usage.input_tokens": facts.num_prompt_tokens,
            "gen_ai.usage.output_tokens": facts.num_output_tokens,
            "gen_ai.response.finish_reasons": facts.finish_reasons,
            "gen_ai.usage.cache_read.input_tokens": facts.num_cached_tokens,
        }
        for name, time in LATENCIES.items():
            seconds = facts.longest(time)
            if seconds is not None:
                found[name] = seconds
        return found

    def close(self) -> None:
        """Send what is left, for `FLUSH_S` at most, and stop."""
        ending = threading.Thread(target=self._provider.shutdown, name="slipstream-spans", daemon=True)
        ending.start()
        ending.join(FLUSH_S)


def open_spans(endpoint: str, *, model: str) -> Spans:
    """Send spans to an OTLP endpoint over HTTP. Raises ConfigError, MissingExtraError."""
    parts = urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise ConfigError(
            f"otlp_traces_endpoint={endpoint!r} is no URL of an OTLP collector over HTTP; write e.g. "
            "http://127.0.0.1:4318/v1/traces."
        )
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        raise MissingExtraError(
            "otlp_traces_endpoint needs OpenTelemetry; run: pip install 'slipstream-llm[otel]'."
        ) from None
    if parts.path in ("", "/"):
        endpoint = endpoint.rstrip("/") + "/v1/traces"
    return Spans(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)), model=model)
