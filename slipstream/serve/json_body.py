"""How does a body become a checked request? Read with a bound, parsed (off the loop when large), typed.

Invariant: what comes out holds no field that is not served, no nesting deeper than `MAX_DEPTH`, and every
name is one that its model declares; all else is a 400 or 415 that names it. Lists of thousands of ids are not
walked here: `Request.create` checks them at C speed.
"""

from __future__ import annotations

import asyncio
import functools
from typing import Any, TypeVar

import msgspec
from pydantic import ValidationError
from starlette.requests import Request

from slipstream.core.checks import shown
from slipstream.serve.context import ServeContext
from slipstream.serve.errors import ApiError
from slipstream.serve.requests.base import RequestBody, check_fields

# Parsing this much takes a few milliseconds: above it, on a thread.
THREAD_BYTES = 64 << 10
MAX_DEPTH = 32

Body = TypeVar("Body", bound=RequestBody)


async def read_body(request: Request, context: ServeContext, model: type[Body]) -> Body:
    """Return the checked body of a request. Raises ApiError."""
    check_content_type(request.headers.get("content-type"))
    data = await read_bytes(request, context.settings.max_body_bytes)
    if len(data) <= THREAD_BYTES:
        return parse(data, model)
    loop = asyncio.get_running_loop()
    return await loop.run_in_executor(context.workers, functools.partial(parse, data, model))


def check_content_type(given: str | None) -> None:
    kind = (given or "").partition(";")[0].strip().lower()
    if kind != "application/json":
        what = f"Content-Type is {shown(kind)}" if kind else "Content-Type is missing"
        message = f"{what}; send JSON with `Content-Type: application/json`."
        raise ApiError(415, message, code="unsupported_media_type")


async def read_bytes(request: Request, max_bytes: int) -> bytes:
    """Return the whole body, never more than `max_bytes`."""
    parts: list[bytes] = []
    size = 0
    async for part in request.stream():
        size += len(part)
        if size > max_bytes:
            raise ApiError(413, f"The body is larger than {max_bytes} bytes.", code="body_too_large")
        parts.append(part)
    return b"".join(parts)


def parse(data: bytes, model: type[Body]) -> Body:
    """Return `data` as a checked `model`. Raises ApiError."""
    body = parse_json(data)
    if not isinstance(body, dict):
        raise ApiError(400, f"The body must be a JSON object, not {shown(body)}.", code="invalid_json")
    check_fields(body, model)
    try:
        return model.model_validate(body)
    except ValidationError as error:
        raise _of_validation(error) from None


def parse_json(data: bytes) -> Any:
    if not data.strip():
        raise ApiError(400, "The body is empty; send a JSON object.", code="invalid_json")
    try:
        body = msgspec.json.decode(data)
    except RecursionError:
        raise _too_deep() from None
    except UnicodeDecodeError:
        raise ApiError(400, "The body is not valid UTF-8.", code="invalid_json") from None
    except msgspec.MsgspecError as error:
        message = f"The body is not valid JSON: {error}. Text must be well-formed, numbers finite."
        raise ApiError(400, message, code="invalid_json") from None
    # Fewer brackets than levels allowed cannot nest deeper.
    if data.count(b"[") + data.count(b"{") > MAX_DEPTH and _depth_exceeds(body, MAX_DEPTH):
        raise _too_deep()
    return body


def _too_deep() -> ApiError:
    return ApiError(400, f"The body nests deeper than {MAX_DEPTH} levels.", code="invalid_json")


def _depth_exceeds(body: Any, limit: int) -> bool:
    """Walk level by level, so that no stack grows with the input."""
    level = [body]
    for _ in range(limit):
        following: list[Any] = []
        for item in level:
            children = item.values() if isinstance(item, dict) else item
            following += [child for child in children if isinstance(child, list | dict)]
        if not following:
            return False
        level = following
    return True


def _of_validation(error: ValidationError) -> ApiError:
    """Say what pydantic found first, with the field, what was given and what is allowed."""
    first = error.errors(include_url=False, include_context=False)[0]
    field = ".".join(map(str, first["loc"])) or "body"
    if first["type"] == "missing":
        return ApiError(400, f"{field} is missing; it is required.", param=field, code="missing_field")
    if first["type"] == "extra_forbidden":
        return ApiError(
            400,
            f"There is no field {field[:64]!r} here.",
            param=field.partition(".")[0],
            code="unknown_field",
        )
    hint = str(first["msg"]).removeprefix("Value error, ").removeprefix("Input should be ")
    message = f"{field} must be {hint}, not {shown(first['input'])}."
    return ApiError(400, message, param=field.partition(".")[0], code="invalid_value")
