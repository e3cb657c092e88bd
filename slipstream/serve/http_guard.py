"""How much patience does a connection get? uvicorn's HTTP protocol with bounds on time, sizes and counts.

uvicorn waits for ever for the end of a request's head, collects headers without a bound and keeps a reader
that never reads. `GuardedProtocol` bounds all of it: 431 or 414 for a head that is too large, 408 for one
that takes too long or a body that trickles, a closed connection for one that is idle or does not read, 503
for one too many. Invariants: whatever a peer sends, a connection holds no more than its head's bound, one
read and the body that waits for the application; and no state of it lasts without a timer.

Sources: RFC 9112 (HTTP/1.1), RFC 6585 section 5 (431). `HttpToolsProtocol` is uvicorn's own, and what is
overridden is tested with raw sockets, so a version that changes underneath fails a test.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from slipstream.serve.errors import ApiError
from slipstream.serve.settings import ServeSettings

# How long what still comes is thrown away after an answer that ended the connection: a connection closed over
# unread data is reset, and its peer may never see the answer.
LINGER_S = 2.0
MAX_LINGER_BYTES = 4 << 20
# A body is looked at this often. The first look comes after as long, so a short stall costs nothing.
BODY_CHECK_S = 10.0
# Chunks below this size on average are an attack on the parser; a few may be small.
SMALL_CHUNK_BYTES = 16
MAX_SMALL_CHUNKS = 4096


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ConnectionLimits:
    """The bounds of one connection; times in seconds."""

    max_connections: int
    max_header_bytes: int
    max_headers: int
    max_url_bytes: int
    header_timeout_s: float
    slow_reader_timeout_s: float
    min_body_bytes_per_s: int
    body_check_s: float = BODY_CHECK_S


def guarded_protocol(settings: ServeSettings, *, body_check_s: float = BODY_CHECK_S) -> Any:
    """Return what uvicorn's `Config(http=...)` takes, for these settings."""
    names = [field.name for field in dataclasses.fields(ConnectionLimits) if field.name != "body_check_s"]
    given = {name: getattr(settings, name) for name in names}
    return functools.partial(GuardedProtocol, ConnectionLimits(**given, body_check_s=body_check_s))


class GuardedProtocol(HttpToolsProtocol):
    """One connection."""

    def __init__(self, limits: ConnectionLimits, **given: Any) -> None:
        super().__init__(**given)
        self._limits = limits
        self._refusal: ApiError | None = None
        self._is_closing = False
        self._is_deaf = False
        self._lingered_bytes = 0
        self._in_head = True
        self._num_headers = 0
        # Bytes fed since the parser last told of something: the head so far, or a chunk's extension.
        self._silent_bytes = 0
        self._num_chunks = 0
        self._chunk_bytes = 0
        self._body_bytes = 0
        self._head_timer: asyncio.TimerHandle | None = None
        self._body_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None

    # The connection

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self._limits.max_connections:
            message = "Too many connections are open; try again later."
            self.transport.write(_plain_response(ApiError(503, message, code="too_many_connections")))
            self._close_now()
            return
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._head_timer, self._body_timer, self._write_timer):
            _cancel(timer)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._is_closing:
            self._lingered_bytes += len(data)
            if self._lingered_bytes > MAX_LINGER_BYTES:
                self.transport.abort()
            return
        if self._is_deaf:
            return
        self._unset_keepalive_if_required()
        if self._in_head and self._head_timer is None:
            self._await_head()
        view = memoryview(data)
        while len(view) and not self._is_closing:
            # A head is fed in pieces that end at its bound, so that what follows it does not count.
            room = self._limits.max_header_bytes - self._silent_bytes + 1
            piece, view = view[:room], view[room:]
            self._silent_bytes += len(piece)
            if not self._feed(piece):
                return
            if self._silent_bytes > self._limits.max_header_bytes and self._refusal is None:
                self._refusal = self._head_error("bytes", self._limits.max_header_bytes)
            if self._refusal is not None:
                self._refuse(self._refusal)

    def _feed(self, piece: memoryview) -> bool:
        """Give the parser a piece; False where nothing may follow it."""
        assert self.parser is not None
        try:
            self.parser.feed_data(piece)
        except httptools.HttpParserUpgrade:
            # No other protocol is spoken here: the request is answered as the plain one that it also is, and
            # what follows it is in a language that nobody asked for.
            self._is_deaf = True
            self.cycle.keep_alive = False
            return False
        except httptools.HttpParserError:
            error = ApiError(400, "This is not a valid HTTP/1.1 request.", code="invalid_http")
            self._refuse(self._refusal or error)
            return False
        return True

    # The head

    def _await_head(self) -> None:
        self._head_timer = self.loop.call_later(self._limits.header_timeout_s, self._on_head_timeout)

    def _on_head_timeout(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            # Something came while an answer is under way; it may wait until that is done.
            self._await_head()
        elif self._silent_bytes:
            message = f"The request's head did not end within {self._limits.header_timeout_s:g} s."
            self._refuse(ApiError(408, message, code="header_timeout"))
        else:
            self._close_now()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head = True
        self._num_headers = self._num_chunks = self._chunk_bytes = self._body_bytes = 0

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        if len(self.url) > self._limits.max_url_bytes:
            message = f"The URL is longer than {self._limits.max_url_bytes} bytes."
            self._refusal = ApiError(414, message, code="url_too_long")

    def on_header(self, name: bytes, value: bytes) -> None:
        self._num_headers += 1
        if self._num_headers > self._limits.max_headers:
            self._refusal = self._head_error("headers", self._limits.max_headers)
        elif self._in_head:
            super().on_header(name, value)
        # Trailers of a chunked body are dropped: the application has its headers already.

    def _head_error(self, what: str, bound: int) -> ApiError:
        message = f"The request's head has more than {bound} {what}."
        return ApiError(431, message, code="headers_too_large")

    def on_headers_complete(self) -> None:
        _cancel(self._head_timer)
        self._head_timer = None
        self._in_head = False
        self._silent_bytes = 0
        if self._refusal is not None:
            return
        super().on_headers_complete()
        cycle = self.cycle
        cycle.transport = _ClosingGently(self, cycle)  # type: ignore[assignment]
        cycle.on_response = functools.partial(self._on_cycle_complete, cycle)
        self._body_timer = self._check_body_later(0)

    # The body

    def _check_body_later(self, num_bytes: int) -> asyncio.TimerHandle:
        return self.loop.call_later(self._limits.body_check_s, self._check_body, num_bytes)

    def _check_body(self, before: int) -> None:
        """Look at how fast a body comes, unless it is the application that does not read it."""
        cycle = self.cycle
        if self._is_closing or not cycle.more_body:
            return
        is_slow = self._body_bytes - before < self._limits.min_body_bytes_per_s * self._limits.body_check_s
        if is_slow and not self.flow.read_paused:
            message = f"The body came slower than {self._limits.min_body_bytes_per_s} bytes a second."
            return self._refuse(ApiError(408, message, code="body_timeout"))
        self._body_timer = self._check_body_later(self._body_bytes)

    def on_body(self, body: bytes) -> None:
        self._silent_bytes = 0
        self._body_bytes += len(body)
        if self._refusal is None:
            super().on_body(body)

    def on_chunk_header(self) -> None:
        self._silent_bytes = 0
        self._num_chunks += 1
        if self._num_chunks > MAX_SMALL_CHUNKS and self._body_bytes < self._num_chunks * SMALL_CHUNK_BYTES:
            message = f"The body's chunks are smaller than {SMALL_CHUNK_BYTES} bytes; send larger ones."
            self._refusal = ApiError(413, message, code="chunks_too_small")

    def on_message_complete(self) -> None:
        _cancel(self._body_timer)
        self._body_timer = None
        self._in_head = True
        self._silent_bytes = 0
        if self._refusal is None:
            super().on_message_complete()

    def _on_cycle_complete(self, cycle: RequestResponseCycle) -> None:
        if cycle.more_body:
            # Nobody wants the rest of the body, and what follows it could not be told from it.
            self._close_gently()
        if not self._is_closing:
            self.on_response_complete()

    # The answer

    def pause_writing(self) -> None:
        super().pause_writing()
        _cancel(self._write_timer)
        self._write_timer = self.loop.call_later(self._limits.slow_reader_timeout_s, self._on_slow_reader)

    def resume_writing(self) -> None:
        _cancel(self._write_timer)
        self._write_timer = None
        super().resume_writing()

    def _on_slow_reader(self) -> None:
        self.logger.warning(
            "a client did not read its answer for %g s: dropped", self._limits.slow_reader_timeout_s
        )
        self.transport.abort()

    # The end

    def _refuse(self, error: ApiError) -> None:
        """Answer for the application, once, unless it has begun to, and close."""
        if self._is_closing:
            return
        if self.cycle is None or self.cycle.response_complete or not self.cycle.response_started:
            self.transport.write(_plain_response(error))
        if self.cycle is not None and not self.cycle.response_complete:
            # Whoever serves the request learns that nobody waits for it.
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self._close_gently()

    def _close_gently(self) -> None:
        """Close for writing, throw away what still comes for a moment, then close."""
        if self._is_closing:
            return
        self._is_closing = True
        for timer in (self._head_timer, self._body_timer):
            _cancel(timer)
        self._head_timer = self._body_timer = None
        if self.flow.read_paused:
            self.flow.resume_reading()
        if self.transport.is_closing() or not self.transport.can_write_eof():
            self.transport.close()
            return
        self.transport.write_eof()
        self.loop.call_later(LINGER_S, self._close_now)

    def _close_now(self) -> None:
        self._is_closing = True
        if not self.transport.is_closing():
            self.transport.close()
        # A peer that does not read must not keep it open; what it did read is safe.
        self.loop.call_later(LINGER_S, self.transport.abort)


class _ClosingGently:
    """A transport as one request's cycle sees it: its `close` leaves the peer time to read the answer."""

    def __init__(self, protocol: GuardedProtocol, cycle: RequestResponseCycle) -> None:
        self._protocol = protocol
        self._cycle = cycle
        self.write = protocol.transport.write
        self.is_closing = protocol.transport.is_closing

    def close(self) -> None:
        if self._cycle.more_body:
            self._protocol._close_gently()
        else:
            self._protocol.transport.close()


def _cancel(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()


def _plain_response(error: ApiError) -> bytes:
    """Return a whole response, for a request that has no application yet."""
    body = bytes(error.response().body)
    head = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(body)
    return STATUS_LINE[error.status] + head + body
