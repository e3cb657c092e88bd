"""Is the server fit for work? `/health`, `/ready` and `/health_generate`, for probes and load balancers.

`/health` says whether the engine makes progress: restart the server where it does not. `/ready` says whether
new requests are taken: send them elsewhere where not. Both are 200 or 503 with the reason, answer without
asking the engine, and need no key, so a reason names nothing of this machine. `/health_generate` needs a key
where keys are set, and generates one token.
"""

from __future__ import annotations

import asyncio
import re
import time
from typing import Any

from fastapi import FastAPI
from starlette.responses import Response

from slipstream.core.request import RequestOptions
from slipstream.core.sampling_params import SamplingParams
from slipstream.engine.generation import Generation
from slipstream.engine.health import Health
from slipstream.engine.prompts import Encoded
from slipstream.engine.service import EngineService
from slipstream.serve.context import ServeContext
from slipstream.serve.errors import ApiError, JsonResponse
from slipstream.serve.openapi import describe_answer

# The time a busy server may take for one more token before it counts as unfit.
PROBE_TIMEOUT_S = 30.0
PROBE_PARAMS = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True, detokenize=False)
DRAINING = "draining"
# Sentences of our own words; a path, an address or an exception's text is something else.
PRESENTABLE = re.compile(r"[A-Za-z0-9 ,.;:'()-]{1,200}")
STATES = {"stuck": "The engine does not come back from a step.", "stopped": "The engine has stopped."}
ASLEEP = "The engine is asleep and takes no requests until it is woken up."


def start_probe(service: EngineService) -> Generation:
    """Ask an engine for one token. Raises EngineError or RequestError where it takes no request."""
    options = RequestOptions(timeout_s=PROBE_TIMEOUT_S)
    request = service.create_request(Encoded([0]), PROBE_PARAMS, options=options)
    generation = Generation(request.request_id, service.abort)
    service.submit(request, generation.put)
    return generation


def cause_of(health: Health) -> str:
    """Say why an engine is unfit, in words that anybody may read."""
    general = STATES.get(health.state, "")
    if health.cause and PRESENTABLE.fullmatch(health.cause):
        return health.cause
    return f"{general} The server's log says why." if health.cause else general


def liveness(context: ServeContext) -> tuple[int, dict[str, Any]]:
    """Return the status and body of `/health`."""
    if not context.has_service:
        return 503, {"status": "loading", "reason": _refusal_text(context)}
    health = context.service.health()
    if health.state in STATES:
        return 503, {"status": health.state, "reason": cause_of(health)}
    return 200, {"status": "ok", "num_steps": health.num_steps}


def readiness(context: ServeContext) -> tuple[int, dict[str, Any]]:
    """Return the status and body of `/ready`."""
    status, body = liveness(context)
    if status != 200:
        return status, body
    if context.refusal is not None:
        return 503, {"status": context.refusal.code or "unavailable", "reason": _refusal_text(context)}
    if context.service.health().state == "asleep":
        return 503, {"status": "asleep", "reason": ASLEEP}
    return 200, {"status": "ready"}


def _refusal_text(context: ServeContext) -> str:
    return "" if context.refusal is None else context.refusal.message


async def generate_one(context: ServeContext) -> float:
    """Return the seconds that one token took. Raises ApiError, 503, where none came."""
    started = time.monotonic()
    generation = start_probe(context.check_open())
    try:
        output = await asyncio.wait_for(generation.aresult(), PROBE_TIMEOUT_S)
    except TimeoutError:
        output = None
    if output is None or output.error is not None or not output.outputs[0].token_ids:
        message = f"The engine generated no token within {PROBE_TIMEOUT_S:g} s."
        raise ApiError(503, message, code="unhealthy")
    return time.monotonic() - started


def add_routes(app: FastAPI, context: ServeContext) -> None:
    async def health() -> Response:
        """Say whether the engine makes progress."""
        return _answer(*liveness(context))

    async def ready() -> Response:
        """Say whether new requests are taken."""
        return _answer(*readiness(context))

    async def health_generate() -> Response:
        """Generate one token, and say how long it took."""
        return JsonResponse({"status": "ok", "seconds": round(await generate_one(context), 6)})

    routes = {"/health": health, "/ready": ready, "/health_generate": health_generate}
    for path, answer in routes.items():
        app.add_api_route(path, answer, methods=["GET"], tags=["operations"], **describe_answer(503))
    for path in ("/health", "/ready"):
        app.add_api_route(path, routes[path], methods=["HEAD"], include_in_schema=False)


def _answer(status: int, body: dict[str, Any]) -> Response:
    headers = {"Cache-Control": "no-store"} | ({"Retry-After": "5"} if status == 503 else {})
    return JsonResponse(body, status=status, headers=headers)
