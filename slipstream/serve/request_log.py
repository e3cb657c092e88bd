"""What is said of each HTTP request when it ends? Its id, its count, its log line, its span.

`x-request-id` is the client's where it is usable, else one of ours, and is on every answer, refusals of the
layers below included: this layer is the outermost. Pure ASGI, so that a stream is never held back by it.
"""

from __future__ import annotations

import logging
import re
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from slipstream.core.log_lines import escaped
from slipstream.serve.context import ServeContext
from slipstream.serve.request_facts import RequestFacts, answering
from slipstream.serve.request_ids import STATE_KEY, request_id_of
from slipstream.serve.spans import Spans

logger = logging.getLogger(__name__)

USABLE_ID = re.compile(rb"[A-Za-z0-9][A-Za-z0-9_.:\-]{0,127}")
# A client that left before it got a status.
CLIENT_CLOSED = 499
MAX_PATH = 256
MAX_TRACE_HEADER = 512


class RequestLog:
    """ASGI middleware around all others."""

    def __init__(self, app: ASGIApp, *, context: ServeContext, spans: Spans | None = None) -> None:
        self._app = app
        self._context = context
        self._spans = spans
        if context.settings.log_requests:
            # Asked for by its own option, so it is heard whatever the level of the rest.
            logger.setLevel(logging.INFO)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        facts = _facts_of(scope)

        async def noting(message: Message) -> None:
            if message["type"] == "http.response.start":
                facts.status = message["status"]
                message["headers"] = [
                    *(pair for pair in message.get("headers", ()) if pair[0].lower() != b"x-request-id"),
                    (b"x-request-id", facts.request_id.encode("ascii")),
                ]
            await send(message)

        with answering(facts):
            try:
                await self._app(scope, receive, noting)
            finally:
                self._end(scope, facts)

    def _end(self, scope: Scope, facts: RequestFacts) -> None:
        facts.end(status=facts.status or CLIENT_CLOSED, route=getattr(scope.get("route"), "path", ""))
        if self._context.metrics is not None:
            self._context.metrics.count_http(scope, facts.status)
        if self._context.settings.log_requests:
            logger.info(
                "%s %s %d in %.3f s", facts.method, facts.path, facts.status, facts.duration_s,
                extra={"facts": log_entry(facts)},
            )  # fmt: skip
        if self._spans is not None:
            self._spans.record(facts)


def _facts_of(scope: Scope) -> RequestFacts:
    """Open a request's facts and give it its id."""
    found = dict.fromkeys((b"x-request-id", b"traceparent", b"tracestate"), b"")
    for name, value in scope["headers"]:
        if name in found and not found[name]:
            found[name] = value
    if USABLE_ID.fullmatch(found[b"x-request-id"]):
        scope.setdefault("state", {})[STATE_KEY] = found[b"x-request-id"].decode("ascii")
    return RequestFacts(
        request_id=request_id_of(scope),
        method=escaped(scope["method"])[:16],
        path=escaped(scope["path"])[:MAX_PATH],
        traceparent=found[b"traceparent"][:MAX_TRACE_HEADER].decode("latin-1"),
        tracestate=found[b"tracestate"][:MAX_TRACE_HEADER].decode("latin-1"),
    )


def log_entry(facts: RequestFacts) -> dict[str, Any]:
    """Return what a structured log holds of a request; no text of a prompt or an answer."""
    entry: dict[str, Any] = {
        "request_id": facts.request_id,
        "method": facts.method,
        "path": facts.path,
        "status": facts.status,
        "duration_s": round(facts.duration_s, 6),
    }
    if facts.outputs:
        entry |= {
            "prompt_tokens": facts.num_prompt_tokens,
            "cached_tokens": facts.num_cached_tokens,
            "output_tokens": facts.num_output_tokens,
            "finish_reasons": facts.finish_reasons,
        }
        for name in ("queue_s", "prefill_s", "ttft_s", "decode_s"):
            seconds = facts.longest(name)
            if seconds is not None:
                entry[name] = round(seconds, 6)
    return entry
