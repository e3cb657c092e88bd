"""What is served here? `/v1/models`, `/version` and `/server_info`, without any path of ours."""

from __future__ import annotations

import time
from typing import Any

import msgspec
from fastapi import FastAPI
from starlette.responses import Response

from slipstream import __version__
from slipstream.core.checks import shown
from slipstream.serve.context import ServeContext
from slipstream.serve.errors import ApiError, JsonResponse
from slipstream.serve.openapi import describe_answer

OWNER = "slipstream"


def add_routes(app: FastAPI, context: ServeContext) -> None:
    created = int(time.time())

    async def list_models() -> Response:
        """List the names under which the model is served."""
        return JsonResponse({"object": "list", "data": [card(name) for name in context.model_names]})

    async def retrieve_model(model: str) -> Response:
        """Describe one served model."""
        if model not in context.model_names:
            message = f"There is no model {shown(model)} here; served: {', '.join(context.model_names)}."
            raise ApiError(404, message, param="model", code="model_not_found")
        return JsonResponse(card(model))

    async def version() -> Response:
        """Return the server's version."""
        return JsonResponse({"version": __version__})

    async def server_info() -> Response:
        """Return what was chosen at start, and the bounds of a request."""
        return JsonResponse(facts(context))

    def card(name: str) -> dict[str, Any]:
        bound = context.service.info.limits.max_seq_len if context.has_service else None
        return {
            "id": name,
            "object": "model",
            "created": created,
            "owned_by": OWNER,
            "root": name,
            "parent": None,
            "max_model_len": bound,
        }

    tags: dict[str, Any] = {"methods": ["GET"], "tags": ["server"]}
    app.add_api_route("/v1/models", list_models, **tags, **describe_answer())
    # A name may hold slashes, as those of the hub do.
    app.add_api_route("/v1/models/{model:path}", retrieve_model, **tags, **describe_answer(400, 404))
    app.add_api_route("/version", version, **tags, **describe_answer())
    app.add_api_route("/server_info", server_info, **tags, **describe_answer(503))


def facts(context: ServeContext) -> dict[str, Any]:
    """Return the facts of the engine that its clients may know."""
    info = context.service.info
    return {
        "version": info.version,
        "models": list(context.model_names),
        "device": info.device,
        "dtype": info.dtype,
        "quantization": info.quantization,
        "max_batch_size": info.max_batch_size,
        "max_num_tokens": info.max_num_tokens,
        "num_pages": info.num_pages,
        "tokens_per_block": info.tokens_per_block,
        "stream_interval": info.stream_interval,
        "default_sampling": info.default_sampling,
        "limits": msgspec.to_builtins(info.limits),
        "max_fan_out": context.settings.max_fan_out,
        "max_body_bytes": context.settings.max_body_bytes,
    }
