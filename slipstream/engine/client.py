"""How do the doors talk to an engine, wherever it runs? Submit, abort, commands, and one stream of events.

`InProcessClient` is the engine in this process: whoever calls `events` drives it. `submit`, `abort` and
`command` may be called from any thread and never block on a step; they take effect before the next one, in
their order. A command that wants an idle engine holds back the requests that came after it.
"""

from __future__ import annotations

import dataclasses
import inspect
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from slipstream.core.errors import ConfigError, EngineError, RequestError, nearest
from slipstream.core.outputs import TokenEvent
from slipstream.core.request import Request
from slipstream.engine.health import DEFAULT_MAX_STEP_S, Health

if TYPE_CHECKING:
    # At run time an engine may be in another process, whose client needs no torch.
    from slipstream.engine.engine import Engine

logger = logging.getLogger(__name__)

T = TypeVar("T")
# So long nothing has come before the engine uses the time: requests that follow each other do not wait.
QUIET_S = 0.05
STOPPED = "The engine is shut down; create a new LLM."


class EngineClient(Protocol):
    """`events` blocks until something happened, `timeout_s` passed or the client was closed (then []).

    `command` runs an engine's command by name; `last_stats` and `health` never wait for the engine.
    """

    def submit(self, requests: Sequence[Request]) -> None: ...

    def abort(self, request_id: str, index: int | None = None) -> None: ...

    def command(self, name: str, arguments: Mapping[str, Any]) -> Future[Any]: ...

    def events(self, timeout_s: float) -> list[TokenEvent]: ...

    def last_stats(self) -> dict[str, Any]: ...

    def health(self) -> Health: ...

    def close(self) -> None: ...


@dataclasses.dataclass(frozen=True, slots=True)
class Command:
    """What an engine does under a name: `function(engine, **arguments)`, between two steps.

    With `when_idle` it waits until nothing runs. `check(**arguments)` raises at once for wrong arguments.
    """

    function: Callable[..., Any]
    when_idle: bool = False
    check: Callable[..., None] | None = None


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Call:
    """A function to run on the engine's thread between two steps; with `when_idle` once nothing runs."""

    function: Callable[[Engine], Any]
    future: Future[Any]
    when_idle: bool

    def run(self, engine: Engine) -> None:
        if not self.future.set_running_or_notify_cancel():
            return
        try:
            self.future.set_result(self.function(engine))
        except Exception as error:
            self.future.set_exception(error)


Abort = tuple[str, int | None]


class InProcessClient:
    """An engine driven by the thread that waits for its events."""

    def __init__(
        self,
        engine: Engine,
        commands: Mapping[str, Command] | None = None,
        *,
        max_step_s: float = DEFAULT_MAX_STEP_S,
    ) -> None:
        self.engine = engine
        self.num_steps = 0
        self._commands = dict(commands or {})
        self._max_step_s = max_step_s
        # When the step or command that runs now began.
        self._busy_since_s: float | None = None
        self._inbox: deque[Request | Abort | Call] = deque()
        self._wake = threading.Condition()
        self._is_closed = False

    def submit(self, requests: Sequence[Request]) -> None:
        """Queue requests. Raises EngineError after `close`."""
        with self._wake:
            if self._is_closed:
                raise EngineError(STOPPED)
            self._inbox.extend(requests)
            self._wake.notify()

    def abort(self, request_id: str, index: int | None = None) -> None:
        """End a request, or one sample of it. Idempotent; unknown ids are ignored."""
        with self._wake:
            self._inbox.append((request_id, index))
            self._wake.notify()

    def call(self, function: Callable[[Engine], T], *, when_idle: bool = False) -> Future[T]:
        """Run a function on the engine's thread between two steps; what it raises is the future's.

        With `when_idle` it waits until nothing runs, and requests that come after it wait for it. Raises
        EngineError after `close`.
        """
        future: Future[T] = Future()
        with self._wake:
            if self._is_closed:
                raise EngineError(STOPPED)
            self._inbox.append(Call(function, future, when_idle))
            self._wake.notify()
        return future

    def command(self, name: str, arguments: Mapping[str, Any]) -> Future[Any]:
        """Run a command by name, as `call` does. Raises ConfigError for what the engine does not take."""
        command = self._commands.get(name)
        if command is None:
            raise ConfigError(
                f"The engine has no command {name!r}; valid: {', '.join(sorted(self._commands))}."
                + nearest(name, self._commands)
            )
        try:
            inspect.signature(command.function).bind(None, **arguments)
        except TypeError as error:
            raise ConfigError(f"The engine's command {name!r}: {error}.") from None
        if command.check is not None:
            command.check(**arguments)
        return self.call(lambda engine: command.function(engine, **arguments), when_idle=command.when_idle)

    def last_stats(self) -> dict[str, Any]:
        """Look at the counters without the engine's thread: for when no step runs any more."""
        command = self._commands.get("stats")
        return {} if command is None else command.function(self.engine)

    @property
    def is_idle(self) -> bool:
        """Say whether `events` has nothing to do."""
        return not self._inbox and not self.engine.has_work

    @property
    def stalled_s(self) -> float:
        """Seconds that the step or command of now has taken so far."""
        since = self._busy_since_s
        return 0.0 if since is None else time.monotonic() - since

    def health(self) -> Health:
        stalled_s, refusal = self.stalled_s, self.engine.refusal
        if self._is_closed:
            return Health("stopped", STOPPED, self.num_steps)
        if stalled_s > self._max_step_s:
            return Health("stuck", f"A step has taken {stalled_s:.0f} s so far.", self.num_steps)
        if refusal is not None:
            return Health("asleep", refusal.message, self.num_steps)
        return Health("ready", "", self.num_steps)

    def use_quiet(self) -> bool:
        """Let the engine prepare a part of what later steps want, if it has any; says whether it did."""
        with self._wake:
            if not self.is_idle or self._is_closed or not self.engine.can_prepare:
                return False
        self._busy_since_s = time.monotonic()
        try:
            self.engine.prepare()
        finally:
            self._busy_since_s = None
        return True

    def _wait(self, timeout_s: float) -> None:
        """Wait for something to do, and use the time once it has been quiet for a while."""
        deadline = time.monotonic() + timeout_s
        with self._wake:
            has_use = timeout_s > QUIET_S and self.engine.can_prepare
            if self.is_idle and not self._is_closed:
                self._wake.wait(QUIET_S if has_use else timeout_s)
        while has_use and time.monotonic() < deadline and self.use_quiet():
            pass

    def events(self, timeout_s: float) -> list[TokenEvent]:
        self._wait(timeout_s)
        self._busy_since_s = time.monotonic()
        try:
            return self._advance()
        finally:
            self._busy_since_s = None

    def _advance(self) -> list[TokenEvent]:
        """Do what has arrived, then one step."""
        events: list[TokenEvent] = []
        while (item := self._next_item(is_quiet=not events)) is not None:
            events += self._receive(item)
        with self._wake:
            if self._is_closed:
                return []
        if self.engine.has_work:
            events += self.engine.step()
            self.num_steps += 1
        return events

    def _next_item(self, *, is_quiet: bool) -> Request | Abort | Call | None:
        """Take the next thing to do before a step, if there is one that need not wait.

        A call waits until events are out (`is_quiet`), so that it sees their effect; one that wants an idle
        engine waits for that too.
        """
        with self._wake:
            if self._is_closed or not self._inbox:
                return None
            head = self._inbox[0]
            if isinstance(head, Call) and not is_quiet:
                return None
            if not (isinstance(head, Call) and head.when_idle and self.engine.has_work):
                return self._inbox.popleft()
            # What runs may be aborted and looked at meanwhile; what was submitted after the call stays.
            waiting = {item.request_id for item in self._inbox if isinstance(item, Request)}
            for item in self._inbox:
                is_call = isinstance(item, Call) and not item.when_idle and is_quiet
                if is_call or (isinstance(item, tuple) and item[0] not in waiting):
                    self._inbox.remove(item)
                    return item
            return None

    def _receive(self, item: Request | Abort | Call) -> list[TokenEvent]:
        if isinstance(item, Call):
            item.run(self.engine)
            return []
        if not isinstance(item, Request):
            return self.engine.abort(*item)
        try:
            self.engine.submit(item)
        except RequestError as error:
            return [refusal(item.request_id, index, error) for index in range(item.num_samples)]
        return []

    def close(self) -> None:
        """Stop for good: a waiting `events` returns, later submits raise, calls not begun fail."""
        with self._wake:
            self._is_closed = True
            calls = [item for item in self._inbox if isinstance(item, Call)]
            self._inbox.clear()
            self._wake.notify_all()
        for call in calls:
            if call.future.set_running_or_notify_cancel():
                call.future.set_exception(EngineError(STOPPED))


def refusal(request_id: str, index: int, error: RequestError) -> TokenEvent:
    """Return the event of a sample whose request was not taken."""
    return TokenEvent(request_id, index, finish_reason="error", error=(error.message, error.code))
