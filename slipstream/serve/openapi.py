"""What does `/openapi.json` say of bodies and answers? Routes read bodies themselves, so they say it here.

Invariant: every status that a route answers with is in its description, with the shape of `errors.py`.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from slipstream.serve.requests.base import RequestBody
from slipstream.serve.requests.chat import ChatBody
from slipstream.serve.requests.completion import CompletionBody
from slipstream.serve.requests.embedding import EmbeddingBody
from slipstream.serve.requests.tokenization import DetokenizeBody, TokenizeBody

REF = "#/components/schemas/{model}"
ERROR_NAME = "ErrorAnswer"
NULLABLE_TEXT = {"type": ["string", "null"]}
ERROR_SCHEMA = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": NULLABLE_TEXT,
                "code": NULLABLE_TEXT,
            },
        }
    },
}
STATUSES = {
    400: "The request is wrong; the message says where.",
    401: "A key is needed.",
    404: "There is no such model.",
    413: "The body is too large.",
    415: "The body is not JSON.",
    429: "The server is full; Retry-After says when to try again.",
    500: "The server failed at this request.",
    503: "The engine takes no requests at the moment.",
    504: "The request ran out of time.",
}
BODIES = (CompletionBody, ChatBody, EmbeddingBody, TokenizeBody, DetokenizeBody)


def error_answers(*statuses: int) -> dict[int | str, dict[str, Any]]:
    schema = {"$ref": REF.format(model=ERROR_NAME)}
    return {
        status: {"description": STATUSES[status], "content": {"application/json": {"schema": schema}}}
        for status in statuses
    }


def describe_body(model: type[RequestBody], *, streams: bool = False) -> dict[str, Any]:
    """Return the arguments of `add_api_route` for a POST route that reads `model`, one of `BODIES`."""
    content: dict[str, Any] = {"application/json": {"schema": {"type": "object"}}}
    if streams:
        content["text/event-stream"] = {"schema": {"type": "string"}}
    schema = {"$ref": REF.format(model=model.__name__)}
    return {
        "response_model": None,
        "responses": {200: {"description": "The answer.", "content": content}, **error_answers(*STATUSES)},
        "openapi_extra": {
            "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}},
        },
    }


def describe_answer(*statuses: int) -> dict[str, Any]:
    """Return the arguments of `add_api_route` for a GET route that answers JSON."""
    content = {"application/json": {"schema": {"type": "object"}}}
    answer = {200: {"description": "The answer.", "content": content}}
    return {"response_model": None, "responses": {**answer, **error_answers(401, *statuses)}}


def openapi_document(app: FastAPI) -> dict[str, Any]:
    """Return the document, with the schemas of the bodies that routes read."""
    if app.openapi_schema is None:
        document = get_openapi(
            title=app.title, version=app.version, description=app.description, routes=app.routes
        )
        _, definitions = models_json_schema([(body, "validation") for body in BODIES], ref_template=REF)
        schemas = document.setdefault("components", {}).setdefault("schemas", {})
        schemas.update(definitions.get("$defs", {}))
        schemas[ERROR_NAME] = ERROR_SCHEMA
        app.openapi_schema = document
    return app.openapi_schema
