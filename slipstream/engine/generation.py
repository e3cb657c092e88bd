"""What does a caller hold while a request runs? A handle to iterate, await, or abort, from any thread.

Outputs are put in by the engine's thread; reading blocks only the reader, or suspends only the coroutine.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Iterator

from slipstream.core.outputs import RequestOutput


class Generation:
    """Outputs of one request, as they come. Iterate it once, `async for` it once, or ask for the `result`."""

    def __init__(self, request_id: str, abort: Callable[[str], None]) -> None:
        self.request_id = request_id
        self._abort = abort
        self._outputs: queue.SimpleQueue[RequestOutput] = queue.SimpleQueue()
        self._last: RequestOutput | None = None
        self._wakeup: Callable[[], None] | None = None

    def put(self, output: RequestOutput) -> None:
        """Deliver an output; called by the engine's thread."""
        self._outputs.put(output)
        wakeup = self._wakeup
        if wakeup is not None:
            wakeup()

    def abort(self) -> None:
        """End the request now; the iteration then ends with finish_reason "cancelled". Idempotent."""
        self._abort(self.request_id)

    def result(self, timeout: float | None = None) -> RequestOutput:
        """Block until the request is finished. Raises TimeoutError after `timeout` seconds in all."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self._is_finished:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            try:
                self._last = self._outputs.get(timeout=left)
            except queue.Empty:
                raise TimeoutError(f"Request {self.request_id} did not finish in {timeout} s.") from None
        assert self._last is not None
        return self._last

    @property
    def _is_finished(self) -> bool:
        return self._last is not None and self._last.finished

    def _abandon(self) -> None:
        if not self._is_finished:
            self.abort()

    def __iter__(self) -> Iterator[RequestOutput]:
        """Yield each output as it comes; leaving the loop early aborts the request."""
        try:
            while not self._is_finished:
                self._last = self._outputs.get()
                yield self._last
        finally:
            self._abandon()

    def __aiter__(self) -> AsyncIterator[RequestOutput]:
        return self.stream()

    async def stream(self) -> AsyncGenerator[RequestOutput, None]:
        """Yield each output as it comes; closing the generator early aborts the request."""
        loop = asyncio.get_running_loop()
        arrived = asyncio.Event()

        def wake() -> None:
            # The reader's event loop may be closed: nobody waits then.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(arrived.set)

        self._wakeup = wake
        try:
            while not self._is_finished:
                arrived.clear()
                try:
                    self._last = self._outputs.get_nowait()
                except queue.Empty:
                    await arrived.wait()
                    continue
                yield self._last
        finally:
            self._wakeup = None
            self._abandon()

    async def aresult(self) -> RequestOutput:
        """Wait for the request without blocking the event loop; cancelling the wait aborts the request."""
        async with contextlib.aclosing(self.stream()) as outputs:
            async for _ in outputs:
                pass
        assert self._last is not None
        return self._last

    def __await__(self) -> Generator[None, None, RequestOutput]:
        return self.aresult().__await__()


class Answer:
    """A request that starts when it is first read: `async for` streams it, `await` returns its last output.

    `start(streaming)` may block, so it runs in a thread. Read it once. A reader that is cancelled or leaves
    early aborts the request, whenever that happens.
    """

    def __init__(self, start: Callable[[bool], Generation]) -> None:
        self._start = start

    async def _generation(self, *, streaming: bool) -> Generation:
        starting = asyncio.ensure_future(asyncio.to_thread(self._start, streaming))
        try:
            return await asyncio.shield(starting)
        except asyncio.CancelledError:
            starting.add_done_callback(_abort_started)
            raise

    async def __aiter__(self) -> AsyncIterator[RequestOutput]:
        generation = await self._generation(streaming=True)
        async with contextlib.aclosing(generation.stream()) as outputs:
            async for output in outputs:
                yield output

    async def aresult(self) -> RequestOutput:
        """Send the request and wait for its last output; cancelling the wait aborts the request."""
        return await (await self._generation(streaming=False)).aresult()

    def __await__(self) -> Generator[None, None, RequestOutput]:
        return self.aresult().__await__()


def _abort_started(starting: asyncio.Future[Generation]) -> None:
    """Abort a request whose reader was cancelled before it got hold of it."""
    if not starting.cancelled() and starting.exception() is None:
        starting.result().abort()
