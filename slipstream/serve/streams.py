"""How do outputs get from the engine's thread to the answers, and when does an answer end early?

The pump's thread hands outputs to the hub, which wakes the event loop once a batch, not once a token. Each
HTTP request reads its own `AnswerStream`. Invariant: whichever way it ends (read to its end, client gone, an
error), its engine requests are aborted or finished and its place in the queue is given back, once.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from slipstream.core.outputs import RequestOutput
from slipstream.core.request import Request
from slipstream.engine.service import EngineService
from slipstream.serve.errors import CLIENT_CLOSED, CLOSED_MESSAGE, ApiError, of_exception
from slipstream.serve.request_facts import current_facts
from slipstream.serve.request_ids import request_id_of

HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    # Proxies hold a stream back unless told.
    (b"x-accel-buffering", b"no"),
]
DONE = b"data: [DONE]\n\n"

Arrival = tuple[int, RequestOutput]


class StreamHub:
    """Carries outputs over to the event loop that the streams are read on."""

    def __init__(self) -> None:
        self._arrived: deque[tuple[AnswerStream, int, RequestOutput]] = deque()
        self._loop: asyncio.AbstractEventLoop | None = None

    def bind(self) -> None:
        """Deliver to the running loop from now on."""
        self._loop = asyncio.get_running_loop()

    def deliver(self, stream: AnswerStream, position: int, output: RequestOutput) -> None:
        """Take an output of a stream's request; called on the engine's thread."""
        self._arrived.append((stream, position, output))

    def flush(self) -> None:
        """Wake the loop for what has arrived; called on the engine's thread after each batch."""
        if self._arrived and self._loop is not None:
            # A loop that is closed has nobody left to tell.
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._hand_out)

    def _hand_out(self) -> None:
        while self._arrived:
            stream, position, output = self._arrived.popleft()
            stream.take(position, output)


class AnswerStream:
    """Outputs of the engine requests behind one HTTP request, by position; one coroutine reads it."""

    def __init__(self, hub: StreamHub, service: EngineService, *, on_close: Callable[[], None]) -> None:
        self._hub = hub
        self._service = service
        self._on_close = on_close
        self._items: list[Arrival] = []
        self._waiter: asyncio.Future[None] | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._open: dict[int, str] = {}
        self._is_closed = False
        self._facts = current_facts()
        self.is_disconnected = False

    def start(self, requests: Sequence[Request], *, streams: bool) -> None:
        """Submit the requests. Raises as `EngineService.submit`; what was submitted before is aborted."""
        self._hub.bind()
        try:
            for position, request in enumerate(requests):
                listener = functools.partial(self._hub.deliver, self, position)
                self._service.submit(request, listener, streams="delta" if streams else False)
                self._open[position] = request.request_id
        except BaseException:
            self.close()
            raise

    def watch(self, receive: Receive) -> None:
        """End the stream as soon as the client is gone."""
        self._watcher = asyncio.ensure_future(self._until_disconnect(receive))

    async def _until_disconnect(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.is_disconnected = True
        self._abort()
        self._wake()

    def take(self, position: int, output: RequestOutput) -> None:
        if self._is_closed:
            return
        if self._facts is not None:
            self._facts.take(output)
        if output.finished:
            self._open.pop(position, None)
        self._items.append((position, output))
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    @property
    def is_finished(self) -> bool:
        """Say whether everything has been read that will ever come."""
        return not self._open and not self._items

    async def next(self) -> list[Arrival]:
        """Return what has come since the last call, at least one output. Raises ApiError (client gone)."""
        while not self._items and not self.is_disconnected:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        if self.is_disconnected:
            raise ApiError(CLIENT_CLOSED, CLOSED_MESSAGE, code="client_closed")
        items, self._items = self._items, []
        return items

    async def last(self) -> list[RequestOutput]:
        """Wait for the last output of every request; returns them by position."""
        found: dict[int, RequestOutput] = {}
        while self._open or self._items:
            found.update(await self.next())
        return [found[position] for position in sorted(found)]

    def _abort(self) -> None:
        for request_id in self._open.values():
            self._service.abort(request_id)
        self._open.clear()

    def close(self) -> None:
        """Abort what still runs and give the place back. Idempotent."""
        if self._is_closed:
            return
        self._is_closed = True
        self._abort()
        if self._watcher is not None:
            self._watcher.cancel()
        self._on_close()


class ChunkWriter(Protocol):
    """Turns outputs into the bytes of server-sent events, in the order of the protocol."""

    def write(self, items: Sequence[Arrival]) -> bytes:
        """Return the events of these outputs. Raises RequestError where one says that its request failed."""
        ...

    def finish(self) -> bytes:
        """Return the events that come after the last output, up to the end mark."""
        ...


class EventStreamResponse(Response):
    """An ASGI answer that writes a stream as it comes. A failure becomes an `error` event, then the end."""

    def __init__(self, stream: AnswerStream, first: Sequence[Arrival], writer: ChunkWriter) -> None:
        super().__init__()
        self._stream = stream
        self._first = first
        self._writer = writer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
            await self._write_all(scope, send)
            await send(_body(b"", more=False))
        except ApiError as error:
            if error.status != CLIENT_CLOSED:
                raise
        finally:
            self._stream.close()

    async def _write_all(self, scope: Scope, send: Send) -> None:
        items: Sequence[Arrival] = self._first
        try:
            while True:
                data = self._writer.write(items)
                if self._stream.is_finished:
                    await send(_body(data + self._writer.finish()))
                    return
                if data:
                    await send(_body(data))
                items = await self._stream.next()
        except Exception as error:
            failure = of_exception(error, request_id_of(scope))
            if failure.status == CLIENT_CLOSED:
                raise failure from None
            await send(_body(failure.event()))


def _body(data: bytes, *, more: bool = True) -> Message:
    return {"type": "http.response.body", "body": data, "more_body": more}
