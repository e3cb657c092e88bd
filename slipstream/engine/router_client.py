"""How do several engines serve as one? Each request goes to the engine with the fewest outstanding tokens.

Every engine has a thread that waits for its events, since an engine in this process runs on the thread that
waits. Invariant: an engine that stops fails its own requests and no other; later ones go to those that live.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import queue
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any

from slipstream.core.errors import EngineError
from slipstream.core.outputs import TokenEvent
from slipstream.core.request import Request
from slipstream.engine.client import STOPPED, EngineClient
from slipstream.engine.health import Health
from slipstream.engine.open_requests import OpenRequests

logger = logging.getLogger(__name__)

POLL_S = 0.5
# Statistics that say a share, or are of each engine alone; the others add up.
MEANS = ("kv_cache_usage", "prefix_hit_rate")
MAXIMA = ("max_outstanding", "max_prompts_per_step", "sleep_level")


@dataclasses.dataclass(slots=True, eq=False)
class Lane:
    """One engine, what it was asked, and why it has stopped ("" while it has not)."""

    client: EngineClient
    open: OpenRequests = dataclasses.field(default_factory=OpenRequests)
    cause: str = ""
    thread: threading.Thread | None = None


class RouterClient:
    """An `EngineClient` over several of the same model. It owns them: `close` closes all."""

    def __init__(self, clients: Sequence[EngineClient]) -> None:
        if not clients:
            raise ValueError("a router needs at least one engine")
        self._lanes = [Lane(client) for client in clients]
        self._lane_of: dict[str, Lane] = {}
        self._lock = threading.Lock()
        self._batches: queue.SimpleQueue[list[TokenEvent]] = queue.SimpleQueue()
        self._is_closed = False
        for number, lane in enumerate(self._lanes):
            lane.thread = threading.Thread(
                target=self._listen, args=(lane,), name=f"slipstream-lane-{number}", daemon=True
            )
            lane.thread.start()

    def submit(self, requests: Sequence[Request]) -> None:
        """Queue each request where least is to do. Raises EngineError where no engine lives."""
        for request in requests:
            self._submit(request)

    def _submit(self, request: Request) -> None:
        refused: set[Lane] = set()
        while True:
            with self._lock:
                lane = self._least(refused)
                lane.open.add(request)
                self._lane_of[request.request_id] = lane
            try:
                lane.client.submit([request])
                return
            except EngineError:
                # It may come back; meanwhile another takes the request.
                refused.add(lane)
                self._forget(lane, request)
            except BaseException:
                self._forget(lane, request)
                raise

    def _least(self, refused: set[Lane]) -> Lane:
        lanes = [lane for lane in self._lanes if not lane.cause and lane not in refused]
        if self._is_closed or not lanes:
            raise EngineError(STOPPED if self._is_closed else self._cause())
        ready = [lane for lane in lanes if lane.client.health().is_ready]
        return min(ready or lanes, key=lambda lane: lane.open.num_tokens)

    def _forget(self, lane: Lane, request: Request) -> None:
        with self._lock:
            lane.open.drop([request])
            self._lane_of.pop(request.request_id, None)

    def _cause(self) -> str:
        causes = [lane.cause or lane.client.health().cause for lane in self._lanes]
        return " ".join(dict.fromkeys(cause for cause in causes if cause)) or STOPPED

    def abort(self, request_id: str, index: int | None = None) -> None:
        with self._lock:
            lane = self._lane_of.get(request_id)
        if lane is not None:
            lane.client.abort(request_id, index)

    def command(self, name: str, arguments: Mapping[str, Any]) -> Future[Any]:
        """Run a command on every engine that lives.

        The future brings merged statistics, else a list with what each returned, or None where none
        returned anything; one that raises is the future's.
        """
        if self._is_closed:
            raise EngineError(STOPPED)
        futures: list[Future[Any]] = []
        for lane in self._lanes:
            # One that is being started again has nothing to do or tell.
            with contextlib.suppress(EngineError):
                if not lane.cause:
                    futures.append(lane.client.command(name, arguments))
        if not futures:
            raise EngineError(self._cause())
        return Gathered(futures, name).future

    def events(self, timeout_s: float) -> list[TokenEvent]:
        if self._is_closed:
            return []
        try:
            events = self._batches.get(timeout=max(timeout_s, 0.0))
            while not self._batches.empty():
                events += self._batches.get_nowait()
        except queue.Empty:
            events = []
        if not events and not self._is_closed and all(lane.cause for lane in self._lanes):
            raise EngineError(self._cause())
        return events

    def _listen(self, lane: Lane) -> None:
        """Pass on the events of one engine until it stops."""
        while not self._is_closed:
            try:
                events = lane.client.events(POLL_S)
            except Exception as error:
                is_told = isinstance(error, EngineError)
                cause = str(error) if is_told else f"The engine stopped: {type(error).__name__}: {error}"
                logger.error("an engine of several stopped: %s", cause)
                with self._lock:
                    lane.cause = cause
                    events = lane.open.fail(cause)
                    for event in events:
                        self._lane_of.pop(event.request_id, None)
                self._batches.put(events)
                return
            if events:
                with self._lock:
                    lane.open.see(events)
                    for event in events:
                        if event.finish_reason is not None and event.request_id not in lane.open:
                            self._lane_of.pop(event.request_id, None)
                self._batches.put(events)

    def last_stats(self) -> dict[str, Any]:
        return merged_stats([lane.client.last_stats() for lane in self._lanes])

    def health(self) -> Health:
        """Be ready while one engine is; the cause tells of the others."""
        states = [
            Health("stopped", lane.cause) if lane.cause else lane.client.health() for lane in self._lanes
        ]
        if self._is_closed:
            return Health("stopped", STOPPED)
        num_steps = sum(state.num_steps for state in states)
        best = min(states, key=lambda state: ("ready", "asleep", "stuck", "stopped").index(state.state))
        ill = [f"Engine {i}: {state.cause}" for i, state in enumerate(states) if not state.is_ready]
        return Health(best.state, " ".join(ill), num_steps)

    def close(self) -> None:
        """Close every engine; a waiting `events` returns. Idempotent."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
        for lane in self._lanes:
            lane.client.close()
        self._batches.put([])
        for lane in self._lanes:
            if lane.thread is not None and lane.thread is not threading.current_thread():
                lane.thread.join()


class Gathered:
    """One future of several."""

    def __init__(self, futures: Sequence[Future[Any]], name: str) -> None:
        self.future: Future[Any] = Future()
        self._futures = list(futures)
        self._name = name
        self._num_left = len(self._futures)
        self._lock = threading.Lock()
        self.future.set_running_or_notify_cancel()
        for future in self._futures:
            future.add_done_callback(self._count)

    def _count(self, done: Future[Any]) -> None:
        with self._lock:
            self._num_left -= 1
            if self._num_left:
                return
        errors = [error for error in (future.exception() for future in self._futures) if error is not None]
        if errors:
            self.future.set_exception(errors[0])
            return
        values = [future.result() for future in self._futures]
        if self._name == "stats":
            self.future.set_result(merged_stats(values))
        elif all(value is None for value in values):
            self.future.set_result(None)
        else:
            self.future.set_result(values)


def merged_stats(each: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Add up the counters of several engines; `engines` holds each by itself."""
    merged: dict[str, Any] = {}
    for name in dict.fromkeys(name for stats in each for name in stats):
        values = [stats[name] for stats in each if name in stats]
        if name in MEANS:
            merged[name] = sum(values) / len(values)
        elif name in MAXIMA:
            merged[name] = max(values)
        elif all(isinstance(value, int | float) for value in values):
            merged[name] = sum(values)
    merged["engines"] = [dict(stats) for stats in each]
    return merged
