"""Who drives the engine? One thread that waits for events, processes them and hands the outputs out.

The thread holds no reference to the `LLM` that owns it, so a deleted `LLM` is collected and stops it. If the
engine raises, every pending request fails with the cause and later submissions are refused: nothing hangs.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

from slipstream.core.errors import EngineError
from slipstream.core.request import Request
from slipstream.engine.client import STOPPED, EngineClient
from slipstream.engine.health import Health
from slipstream.engine.output_processor import Listener, OutputProcessor, Streams

logger = logging.getLogger(__name__)

POLL_S = 0.5


class Pump:
    """The engine's thread. `stop` is idempotent and leaves no thread behind.

    `after_batch` is called on it once after the listeners of a batch of events.
    """

    def __init__(self, client: EngineClient, processor: OutputProcessor) -> None:
        self.client = client
        self.processor = processor
        self.after_batch: Callable[[], None] | None = None
        self._owner = os.getpid()
        self._is_stopping = threading.Event()
        self._failure: str | None = None
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="slipstream-engine", daemon=True)
        self._thread.start()

    def submit(self, requests: Sequence[tuple[Request, Listener]], *, streams: Streams = False) -> None:
        """Queue requests, all or none. Raises EngineError where the engine has stopped."""
        self._check_owner()
        with self._lock:
            if self._failure is not None or self._is_stopping.is_set():
                raise EngineError(self._failure or STOPPED)
            added: list[Request] = []
            try:
                for request, listener in requests:
                    self.processor.add(request, listener, streams=streams)
                    added.append(request)
                self.client.submit(added)
            except Exception:
                for request in added:
                    self.processor.discard(request.request_id)
                raise

    def command(self, name: str, arguments: Mapping[str, Any]) -> Future[Any]:
        """Run a command of the engine between two steps; see `EngineClient.command`."""
        self._check_owner()
        if threading.current_thread() is self._thread:
            raise EngineError("The engine's own thread cannot wait for itself; call from another thread.")
        if self._failure is not None:
            raise EngineError(self._failure)
        return self.client.command(name, arguments)

    def health(self) -> Health:
        if self._failure is not None:
            return Health("stopped", self._failure)
        return self.client.health()

    def _check_owner(self) -> None:
        # Before any lock: a fork may have copied it while the engine's thread held it.
        if os.getpid() != self._owner:
            raise EngineError(
                "This process was forked from the one that runs the engine, and the engine's thread stayed "
                "there; create the LLM in this process, or start it with the 'spawn' method."
            )

    def _run(self) -> None:
        try:
            while not self._is_stopping.is_set():
                events = self.client.events(POLL_S)
                for request_id, index in self.processor.process(events):
                    self.client.abort(request_id, index)
                if events and self.after_batch is not None:
                    self.after_batch()
        except Exception as error:
            logger.exception("the engine stopped")
            is_told = isinstance(error, EngineError)
            self._fail(str(error) if is_told else f"The engine stopped: {type(error).__name__}: {error}")
        else:
            self._fail(STOPPED)

    def _fail(self, message: str) -> None:
        with self._lock:
            self._failure = message
            self.client.close()
            self.processor.fail_all(message)
            if self.after_batch is not None:
                self.after_batch()

    def stop(self) -> None:
        """End the thread after the step it is in; pending requests fail with code "engine_stopped"."""
        if os.getpid() != self._owner:
            return
        self._is_stopping.set()
        self.client.close()
        if threading.current_thread() is not self._thread:
            self._thread.join()
