"""What does a caller hold while a request runs? A handle to iterate, await, or abort, from any thread.

Outputs are put in by the engine's thread; reading blocks only the reader, or suspends only the coroutine.
"""

from __future__ import annotations

import asyncio
import queue
import time
from collections.abc import AsyncIterator, Callable, Generator, Iterator

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

    async def __aiter__(self) -> AsyncIterator[RequestOutput]:
        loop = asyncio.get_running_loop()
        arrived = asyncio.Event()

        def wake() -> None:
            if not loop.is_closed():
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
        async for _ in self:
            pass
        assert self._last is not None
        return self._last

    def __await__(self) -> Generator[None, None, RequestOutput]:
        return self.aresult().__await__()
