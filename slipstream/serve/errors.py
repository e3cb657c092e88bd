"""How does every failure look over HTTP? `{"error": {message, type, param, code}}`, whoever failed.

What the client did is a 4xx that says what to change. What went wrong here is a 5xx that says nothing of the
inside: the request's id, under which the log holds the cause.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import msgspec
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from slipstream.core.errors import ConfigError, EngineError, RequestError
from slipstream.serve.request_ids import request_id_of

logger = logging.getLogger(__name__)

INVALID_REQUEST = "invalid_request_error"
# What OpenAI calls the failures that have a name there; every other 4xx is an invalid request.
KINDS = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    500: "server_error",
    501: "not_implemented_error",
    503: "overloaded_error",
    504: "timeout_error",
}
# Failures of a request that are not its author's: who sends it again may succeed.
STATUS_OF_CODE = {
    "engine_stopped": 503,
    "engine_asleep": 503,
    "numerical_error": 500,
    "processing_error": 500,
}
INTERNAL_CODES = {"engine_stopped", "numerical_error", "processing_error"}
# An answer that nobody waits for any more; the status is for the log.
CLIENT_CLOSED = 499
CLOSED_MESSAGE = "The client closed the connection."
RETRY_AFTER = {"Retry-After": "5"}
MAX_SHOWN_PATH = 120


class ApiError(Exception):
    """A refusal or failure with its status; `param` names the field, `code` is a stable word."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str | None = None,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind or KINDS.get(status, INVALID_REQUEST)
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        error = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return {"error": error}

    def event(self) -> bytes:
        """Return the server-sent event of a failure after the answer began."""
        return b"event: error\ndata: " + msgspec.json.encode(self.body()) + b"\n\n"

    def response(self) -> Response:
        return JsonResponse(self.body(), status=self.status, headers=self.headers)


class JsonResponse(Response):
    """A JSON body, encoded by msgspec; bytes are JSON already."""

    def __init__(self, content: Any, *, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else msgspec.json.encode(content)
        super().__init__(body, status, headers=headers, media_type="application/json")


def of_request(error: RequestError, request_id: str) -> ApiError:
    """Return the HTTP form of what the engine said of one request: why it is refused, or that it failed."""
    status = STATUS_OF_CODE.get(error.code, 400)
    if error.code in INTERNAL_CODES:
        # Its words may be those of whatever was raised inside.
        logger.error("request %s failed: %s", request_id, error.message)
        return internal(request_id, status=status, code=error.code)
    headers = RETRY_AFTER if status == 503 else None
    return ApiError(status, error.message, param=error.param or None, code=error.code, headers=headers)


def internal(request_id: str, *, status: int = 500, code: str = "internal_error") -> ApiError:
    """Return what a client may know of a failure that is ours."""
    message = f"The server failed at this request; its log names the cause under request id {request_id}."
    return ApiError(status, message, code=code, headers=RETRY_AFTER if status == 503 else None)


def of_exception(error: Exception, request_id: str) -> ApiError:
    """Return the HTTP form of anything raised; what nobody meant to raise is logged and stays inside."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestError):
        return of_request(error, request_id)
    if isinstance(error, ClientDisconnect):
        return ApiError(CLIENT_CLOSED, CLOSED_MESSAGE, code="client_closed")
    if isinstance(error, EngineError):
        logger.error("request %s: %s", request_id, error)
        message = "The engine has stopped and takes no requests; try again once the server is ready."
        return ApiError(503, message, code="engine_stopped", headers=RETRY_AFTER)
    if isinstance(error, ConfigError):
        return ApiError(400, str(error), code="unsupported")
    logger.error("request %s failed", request_id, exc_info=error)
    return internal(request_id)


async def answer_exception(request: Request, error: Exception) -> Response:
    return of_exception(error, request_id_of(request.scope)).response()


async def answer_http(request: Request, error: Exception) -> Response:
    """Answer what routing itself refuses: no such path, no such method."""
    assert isinstance(error, HTTPException)
    where = f"{request.method} {request.url.path}"
    shown = where if len(where) <= MAX_SHOWN_PATH else where[:MAX_SHOWN_PATH] + "..."
    allowed = {name.lower(): value for name, value in (error.headers or {}).items()}.get("allow", "")
    messages = {
        404: f"There is no {shown!r} here; see /openapi.json for what is served.",
        405: f"{shown!r} is not served with this method; allowed: {allowed}.",
    }
    message = messages.get(error.status_code, str(error.detail))
    return ApiError(error.status_code, message, headers=error.headers, code="not_found").response()


async def answer_validation(request: Request, error: Exception) -> Response:
    """Answer what FastAPI's own parsing of paths and queries refuses."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    name = str(first["loc"][-1])[:MAX_SHOWN_PATH]
    return ApiError(400, f"{name}: {first['msg']}.", param=name, code="invalid_value").response()


def add_handlers(app: FastAPI) -> None:
    """Let the application answer every failure in the one shape."""
    for kind in (ApiError, RequestError, EngineError, ConfigError, Exception):
        app.add_exception_handler(kind, answer_exception)
    app.add_exception_handler(HTTPException, answer_http)
    app.add_exception_handler(RequestValidationError, answer_validation)
