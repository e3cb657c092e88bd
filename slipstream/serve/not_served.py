"""Which routes do clients know that are not here? Each answers 501 with its name and what to use instead."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from slipstream.serve.errors import ApiError

LATER = "a later version brings it"
NOT_SERVED = {
    "/v1/responses": f"{LATER}; use /v1/chat/completions",
    "/v1/messages": f"{LATER}; use /v1/chat/completions",
    "/v1/batches": f"{LATER}; send the requests one by one",
    "/v1/files": f"{LATER}, with /v1/batches",
    "/v1/rerank": LATER,
    "/rerank": LATER,
    "/v1/score": LATER,
    "/score": LATER,
    "/pooling": "use /v1/embeddings",
    "/classify": LATER,
    "/v1/images/generations": "images are not made here",
    "/v1/audio/speech": "audio is not made here",
    "/v1/audio/transcriptions": "audio is not read here",
    "/v1/moderations": "nothing is moderated here",
    "/v1/load_lora_adapter": "merge the adapter into the checkpoint",
    "/v1/unload_lora_adapter": "merge the adapter into the checkpoint",
    "/generate": "use /v1/completions",
    "/invocations": "use /v1/chat/completions",
}
METHODS: Any = ["GET", "POST", "DELETE", "PUT", "PATCH"]


def add_routes(app: FastAPI) -> None:
    async def refuse(http: HttpRequest) -> Response:
        path = http.scope["route"].path.removesuffix("/{rest:path}")
        message = f"{path} is not served by this version; {NOT_SERVED[path]}."
        raise ApiError(501, message, code="not_served")

    for path in NOT_SERVED:
        for spelling in (path, path + "/{rest:path}"):
            app.add_api_route(spelling, refuse, methods=METHODS, include_in_schema=False)
