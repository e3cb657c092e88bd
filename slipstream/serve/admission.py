"""Is there room for this request? The queue's bounds, by requests and by tokens, and each key's share.

A ticket is held from before a request reaches the engine until its end. So what is bounded is what runs and
waits together: what the engine runs at once, and `max_queued_*` beyond it. Invariants: the sums equal the
tickets held, a request is admitted or refused at once and never waits here, and one that finds an empty
server is always admitted, however large.

Shares: while one key alone is active it may take everything but a reserve of the queue, so that a newcomer
always finds a place. Once others hold tickets, or were refused a moment ago, it may hold `per_key_share` of
the bounds; what it holds beyond that is not taken away, but it gets nothing new.
"""

from __future__ import annotations

import dataclasses
import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable

from slipstream.serve.errors import ApiError

# Releases of the last seconds say how fast the queue drains.
RATE_WINDOW_S = 20.0
MAX_RELEASES = 1024
MAX_RETRY_S = 60
# How long a refused key counts as one that wants a place.
WAITING_S = 10.0
RESERVE = 0.1


class OverloadError(ApiError):
    """There is no room now; `retry_after_s` is when there should be."""

    def __init__(self, message: str, *, code: str, retry_after_s: int) -> None:
        super().__init__(429, message, code=code, headers={"Retry-After": str(retry_after_s)})
        self.retry_after_s = retry_after_s


@dataclasses.dataclass(slots=True, eq=False)
class Ticket:
    """A place that is held. `release` gives it back; once is enough, and more does no harm."""

    key: str
    num_requests: int
    num_tokens: int
    _admission: Admission | None

    def release(self) -> None:
        admission, self._admission = self._admission, None
        if admission is not None:
            admission._give_back(self)

    def __enter__(self) -> Ticket:
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Bounds:
    """What may be in the server at once; `num_keys` is how many keys share it (0 or 1: no shares)."""

    max_requests: int
    max_tokens: int
    queued_requests: int
    queued_tokens: int
    per_key_share: float = 1.0
    num_keys: int = 0


def bounds_for(
    *,
    max_batch_size: int,
    kv_tokens: int,
    max_queued_requests: int,
    max_queued_tokens: int,
    per_key_share: float = 1.0,
    num_keys: int = 0,
    num_workers: int = 1,
) -> Bounds:
    """Return one API worker's part of the bounds of a server, rounded up."""

    def part(total: int) -> int:
        return -(-total // num_workers)

    return Bounds(
        max_requests=part(max_batch_size + max_queued_requests),
        max_tokens=part(kv_tokens + max_queued_tokens),
        queued_requests=part(max_queued_requests),
        queued_tokens=part(max_queued_tokens),
        per_key_share=per_key_share,
        num_keys=num_keys,
    )


class Admission:
    """The bounded queue's door. Any thread may admit and release."""

    def __init__(self, bounds: Bounds, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.bounds = bounds
        self.num_requests = 0
        self.num_tokens = 0
        self.num_refused = 0
        self._requests: Counter[str] = Counter()
        self._tokens: Counter[str] = Counter()
        self._refused_at: dict[str, float] = {}
        self._releases: deque[tuple[float, int]] = deque(maxlen=MAX_RELEASES)
        self._clock = clock
        self._lock = threading.Lock()

    def admit(self, key: str, *, num_requests: int, num_tokens: int) -> Ticket:
        """Take a place for requests (prompts x n) whose prompts have so many tokens in all.

        `key` is the name of the caller's key, "" without keys. Raises OverloadError.
        """
        with self._lock:
            refusal = self._refusal(key, num_requests, num_tokens)
            if refusal is not None:
                self.num_refused += 1
                self._note_refused(key)
                raise refusal
            self._refused_at.pop(key, None)
            self.num_requests += num_requests
            self.num_tokens += num_tokens
            self._requests[key] += num_requests
            self._tokens[key] += num_tokens
        return Ticket(key, num_requests, num_tokens, self)

    def _refusal(self, key: str, num_requests: int, num_tokens: int) -> OverloadError | None:
        bounds = self.bounds
        over_requests = self.num_requests + num_requests - bounds.max_requests
        over_tokens = self.num_tokens + num_tokens - bounds.max_tokens
        if self.num_requests and (over_requests > 0 or over_tokens > 0):
            what = (
                f"{self.num_requests} requests, of at most {bounds.max_requests}"
                if over_requests > 0
                else f"{self.num_tokens} prompt tokens, of at most {bounds.max_tokens}"
            )
            return OverloadError(
                f"The server is full: it holds {what}. Send the request again later.",
                code="queue_full",
                retry_after_s=self._retry_after(max(over_requests, 1)),
            )
        return self._share_refusal(key, num_requests, num_tokens)

    def _share_refusal(self, key: str, num_requests: int, num_tokens: int) -> OverloadError | None:
        bounds = self.bounds
        if bounds.num_keys < 2 or not self._requests[key]:
            return None
        max_requests, max_tokens = self._share(key)
        over = self._requests[key] + num_requests - max_requests
        if over <= 0 and self._tokens[key] + num_tokens <= max_tokens:
            return None
        return OverloadError(
            f"This key holds {self._requests[key]} requests with {self._tokens[key]} prompt tokens, and its "
            f"share is {max_requests} with {max_tokens}. Send the request again later.",
            code="key_share_exceeded",
            retry_after_s=self._retry_after(max(over, 1)),
        )

    def _share(self, key: str) -> tuple[int, int]:
        bounds = self.bounds
        if self._others_want(key):
            return (
                max(1, int(bounds.max_requests * bounds.per_key_share)),
                max(1, int(bounds.max_tokens * bounds.per_key_share)),
            )
        return (
            bounds.max_requests - math.ceil(bounds.queued_requests * RESERVE),
            bounds.max_tokens - math.ceil(bounds.queued_tokens * RESERVE),
        )

    def _others_want(self, key: str) -> bool:
        if any(count and name != key for name, count in self._requests.items()):
            return True
        since = self._clock() - WAITING_S
        return any(at > since and name != key for name, at in self._refused_at.items())

    def _note_refused(self, key: str) -> None:
        # Names of keys, so there are no more of them than keys.
        self._refused_at[key] = self._clock()

    def _retry_after(self, num_wanted: int) -> int:
        """Estimate when so many places are free, by how fast they were given back lately."""
        now = self._clock()
        recent = [(at, count) for at, count in self._releases if at > now - RATE_WINDOW_S]
        if not recent:
            return 1 if not self._releases else MAX_RETRY_S // 4
        seconds = max(now - recent[0][0], 1.0)
        rate = sum(count for _, count in recent) / seconds
        return min(MAX_RETRY_S, max(1, math.ceil(num_wanted / rate)))

    def _give_back(self, ticket: Ticket) -> None:
        with self._lock:
            self.num_requests -= ticket.num_requests
            self.num_tokens -= ticket.num_tokens
            for held, count in ((self._requests, ticket.num_requests), (self._tokens, ticket.num_tokens)):
                held[ticket.key] -= count
                if not held[ticket.key]:
                    del held[ticket.key]
            self._releases.append((self._clock(), ticket.num_requests))
