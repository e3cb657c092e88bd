"""What has the engine done lately? `/trace` draws it, `/trace.json` is the records, one more is for Perfetto.

They hold ids, times and counts, never text, and need a key like every other route. `?engine=N` picks one of
several engines.
"""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

from slipstream.engine.step_records import EngineTrace
from slipstream.serve.context import ServeContext
from slipstream.serve.errors import RETRY_AFTER, ApiError
from slipstream.trace.page import to_html
from slipstream.trace.perfetto import to_perfetto
from slipstream.trace.reading import encode_trace
from slipstream.trace.timeline import timeline_of

# An engine answers between two steps; one that takes longer than this is stuck, and `/health` says so.
TIMEOUT_S = 20.0
# As strict as the page's own policy, and it is nobody's frame.
PAGE_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:; "
        "frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
    ),
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
}


def add_routes(app: FastAPI, context: ServeContext) -> None:
    model = context.model_names[0]

    @app.get("/trace", include_in_schema=False)
    async def trace_page(request: Request) -> Response:
        """Draw what the engine did lately."""
        trace = await _read(context, request)
        page = await asyncio.to_thread(lambda: to_html(timeline_of(trace, model=model)))
        return Response(page, media_type="text/html", headers=PAGE_HEADERS)

    @app.get("/trace.json", include_in_schema=False)
    async def trace_records(request: Request) -> Response:
        """Return the records, which `slipstream trace` draws."""
        trace = await _read(context, request)
        data = await asyncio.to_thread(encode_trace, trace, model=model)
        return Response(data, media_type="application/json", headers={"Cache-Control": "no-store"})

    @app.get("/trace.perfetto.json", include_in_schema=False)
    async def trace_for_perfetto(request: Request) -> Response:
        """Return the same for ui.perfetto.dev."""
        trace = await _read(context, request)
        data = await asyncio.to_thread(lambda: to_perfetto(timeline_of(trace, model=model)))
        return Response(data, media_type="application/json", headers={"Cache-Control": "no-store"})


async def _read(context: ServeContext, request: Request) -> EngineTrace:
    """Ask the engine for its ring. Raises ApiError where it does not answer or there is no such engine."""
    number = request.query_params.get("engine", "0")
    try:
        asked = asyncio.wrap_future(context.service.command("trace"))
        found: Any = await asyncio.wait_for(asked, TIMEOUT_S)
    except TimeoutError:
        message = "The engine does not answer; its trace can be read when the step it is in has ended."
        raise ApiError(503, message, code="engine_stuck", headers=RETRY_AFTER) from None
    several = found if isinstance(found, list) else [found]
    if not number.isascii() or not number.isdigit() or int(number[:9]) >= len(several):
        message = f"engine is 0 to {len(several) - 1}, the number of an engine of this server."
        raise ApiError(400, message, param="engine", code="invalid_value")
    # Across processes it comes as plain data.
    return await asyncio.to_thread(msgspec.convert, several[int(number)], EngineTrace)
