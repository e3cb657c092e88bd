"""How large may a body be? What declares or sends more is answered 413, and no more of it is read.

Plain ASGI. Invariant: whoever reads the body below never holds more than the limit and one message; the 413
goes out at the message that exceeds it, whatever the application does meanwhile.
"""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from slipstream.serve.errors import ApiError

DISCONNECT: Message = {"type": "http.disconnect"}


class BodyLimits:
    """ASGI middleware that bounds the bodies of requests."""

    def __init__(self, app: ASGIApp, *, max_body_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        declared = declared_length(scope)
        if declared is None or declared > self._max_bytes:
            return await self._refusal(declared).response()(scope, receive, send)
        bounded = _BoundedBody(self, scope, receive, send)
        await self._app(scope, bounded.receive, bounded.send)

    def _refusal(self, declared: int | None) -> ApiError:
        # Nobody reads the rest of the body, so the connection cannot serve another request.
        close = {"Connection": "close"}
        if declared is None:
            message = "Content-Length must be one whole number of bytes."
            return ApiError(400, message, code="invalid_header", headers=close)
        message = f"The body is larger than {self._max_bytes} bytes; send less in one request."
        return ApiError(413, message, code="body_too_large", headers=close)


class _BoundedBody:
    """One request's body, counted as it is read."""

    def __init__(self, limits: BodyLimits, scope: Scope, receive: Receive, send: Send) -> None:
        self._limits = limits
        self._scope = scope
        self._receive = receive
        self._send = send
        self._num_bytes = 0
        self._is_refused = False
        self._has_answer = False

    async def receive(self) -> Message:
        if self._is_refused:
            return DISCONNECT
        message = await self._receive()
        if message["type"] != "http.request":
            return message
        self._num_bytes += len(message.get("body", b""))
        if self._num_bytes <= self._limits._max_bytes:
            return message
        self._is_refused = True
        if not self._has_answer:
            response = self._limits._refusal(self._num_bytes).response()
            await response(self._scope, self._receive, self._send)
        return DISCONNECT

    async def send(self, message: Message) -> None:
        """Pass the application's answer on, unless the 413 went out: then nobody waits for it."""
        if not self._is_refused:
            self._has_answer = True
            await self._send(message)


def declared_length(scope: Scope) -> int | None:
    """Return the length that the headers declare, 0 where they declare none; None where it is no number."""
    values = [value for name, value in scope["headers"] if name == b"content-length"]
    if not values:
        return 0
    # int() would take signs, spaces and underscores too.
    return int(values[0]) if len(values) == 1 and values[0].isdigit() and len(values[0]) < 20 else None
