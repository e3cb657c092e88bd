"""What is known of one HTTP request when it ends? Its log line and its span are made from this.

The log's middleware opens the facts, whoever answers adds to them, and they are in reach of every log line
that is written meanwhile. Nothing of what a client said is among them but names that were checked.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from slipstream.core.outputs import RequestOutput


@dataclasses.dataclass(slots=True)
class RequestFacts:
    """One request. Seconds are on the monotonic clock, `wall_ns` is when it came on the wall's.

    `outputs` are the last ones of the engine requests behind it, `finish_reasons` those of their samples as
    they ended.
    """

    request_id: str
    method: str
    path: str
    started_s: float = dataclasses.field(default_factory=time.monotonic)
    wall_ns: int = dataclasses.field(default_factory=time.time_ns)
    ended_s: float | None = None
    status: int = 0
    route: str = ""
    traceparent: str = ""
    tracestate: str = ""
    outputs: list[RequestOutput] = dataclasses.field(default_factory=list[RequestOutput])
    finish_reasons: list[str] = dataclasses.field(default_factory=list[str])

    def take(self, output: RequestOutput) -> None:
        """Note an update of one of its engine requests, each end once."""
        self.finish_reasons += [sample.finish_reason for sample in output.outputs if sample.finish_reason]
        if output.finished:
            self.outputs.append(output)

    def end(self, *, status: int, route: str) -> None:
        self.ended_s = time.monotonic()
        self.status = status
        self.route = route

    @property
    def duration_s(self) -> float:
        return (time.monotonic() if self.ended_s is None else self.ended_s) - self.started_s

    @property
    def num_prompt_tokens(self) -> int:
        return sum(len(output.prompt_token_ids) for output in self.outputs)

    @property
    def num_cached_tokens(self) -> int:
        return sum(output.num_cached_tokens for output in self.outputs)

    @property
    def num_output_tokens(self) -> int:
        return sum(output.metrics.num_output_tokens for output in self.outputs if output.metrics is not None)

    def longest(self, name: str) -> float | None:
        """Return the longest of a time of `RequestMetrics` over the engine requests; None if none has it."""
        times = [getattr(output.metrics, name) for output in self.outputs if output.metrics is not None]
        return max((seconds for seconds in times if seconds is not None), default=None)


_current: ContextVar[RequestFacts | None] = ContextVar("slipstream_request_facts", default=None)


def current_facts() -> RequestFacts | None:
    """Return the facts of the request that this task answers, None outside of any."""
    return _current.get()


@contextmanager
def answering(facts: RequestFacts) -> Iterator[None]:
    """Make the facts those of the current task while it answers."""
    token = _current.set(facts)
    try:
        yield
    finally:
        _current.reset(token)
