"""How do the doors talk to an engine, wherever it runs? Submit, abort, and one stream of events.

`InProcessClient` is the engine in this process: whoever calls `events` drives it. `submit` and `abort` may be
called from any thread and never block on a step; they take effect before the next one.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Sequence
from typing import Protocol

from slipstream.core.errors import EngineError, RequestError
from slipstream.core.outputs import TokenEvent
from slipstream.core.request import Request
from slipstream.engine.engine import Engine

logger = logging.getLogger(__name__)


class EngineClient(Protocol):
    """`events` blocks until something happened, `timeout_s` passed or the client was closed (then [])."""

    def submit(self, requests: Sequence[Request]) -> None: ...

    def abort(self, request_id: str, index: int | None = None) -> None: ...

    def events(self, timeout_s: float) -> list[TokenEvent]: ...

    def close(self) -> None: ...


class InProcessClient:
    """An engine driven by the thread that waits for its events."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._inbox: deque[Request | tuple[str, int | None]] = deque()
        self._wake = threading.Condition()
        self._is_closed = False

    def submit(self, requests: Sequence[Request]) -> None:
        """Queue requests. Raises EngineError after `close`."""
        with self._wake:
            if self._is_closed:
                raise EngineError("The engine is shut down; create a new LLM.")
            self._inbox.extend(requests)
            self._wake.notify()

    def abort(self, request_id: str, index: int | None = None) -> None:
        """End a request, or one sample of it. Idempotent; unknown ids are ignored."""
        with self._wake:
            self._inbox.append((request_id, index))
            self._wake.notify()

    def events(self, timeout_s: float) -> list[TokenEvent]:
        with self._wake:
            if not self._inbox and not self.engine.has_work and not self._is_closed:
                self._wake.wait(timeout_s)
            if self._is_closed:
                return []
            arrived = list(self._inbox)
            self._inbox.clear()
        events: list[TokenEvent] = []
        for item in arrived:
            events += self._receive(item)
        if self.engine.has_work:
            events += self.engine.step()
        return events

    def _receive(self, item: Request | tuple[str, int | None]) -> list[TokenEvent]:
        if not isinstance(item, Request):
            return self.engine.abort(*item)
        try:
            self.engine.submit(item)
        except RequestError as error:
            return [_refusal(item, index, error) for index in range(item.num_samples)]
        return []

    def close(self) -> None:
        """Stop for good: a waiting `events` returns, later submits raise; nothing more comes."""
        with self._wake:
            self._is_closed = True
            self._wake.notify_all()


def _refusal(request: Request, index: int, error: RequestError) -> TokenEvent:
    return TokenEvent(request.request_id, index, finish_reason="error", error=(error.message, error.code))
