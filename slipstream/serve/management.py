"""What may an operator do to a running engine over HTTP? Routes that exist only where admin keys do.

`Auth` lets only admin keys at these paths; each route checks for itself again, so that a path it knows in a
spelling that `Auth` does not is still closed. New weights are not among them: a path that comes over HTTP
would be read on this machine.
"""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

from slipstream.core.errors import ConfigError
from slipstream.serve.auth import key_name_of
from slipstream.serve.context import ServeContext
from slipstream.serve.errors import ApiError, JsonResponse

LEVELS = ("1", "2")


def add_routes(app: FastAPI, context: ServeContext) -> None:
    """Add the routes, if there are admin keys."""
    if not context.settings.admin_keys:
        return
    admins = {key.name for key in context.settings.admin_keys}

    async def run(request: Request, name: str, **arguments: Any) -> Response:
        if key_name_of(request.scope) not in admins:
            raise ApiError(403, "This route needs an admin key.", code="forbidden")
        try:
            await asyncio.wrap_future(context.service.command(name, **arguments))
        except ConfigError as error:
            raise ApiError(409, str(error), code="not_possible_now") from None
        return JsonResponse({"status": "ok"})

    @app.post("/sleep", include_in_schema=False)
    async def sleep(request: Request) -> Response:
        """Free the KV cache (`level=1`), or the weights too (`level=2`), once nothing runs."""
        level = request.query_params.get("level", "1")
        if level not in LEVELS:
            message = "level is 1, which frees the KV cache, or 2, which frees the weights too."
            raise ApiError(400, message, param="level", code="invalid_value")
        return await run(request, "sleep", level=int(level))

    @app.post("/wake_up", include_in_schema=False)
    async def wake_up(request: Request) -> Response:
        """Allocate again what sleep freed."""
        return await run(request, "wake_up")

    @app.post("/reset_prefix_cache", include_in_schema=False)
    async def reset_prefix_cache(request: Request) -> Response:
        """Forget every cached prefix."""
        return await run(request, "reset_prefix_cache")
