"""Which samples of which requests have not ended yet, and what do they hear when their engine is gone?"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from slipstream.core.errors import RequestError
from slipstream.core.outputs import TokenEvent
from slipstream.core.request import Request
from slipstream.engine.client import refusal


class OpenRequests:
    """Samples between submission and their last event. The caller's lock guards it."""

    def __init__(self) -> None:
        self._open: dict[str, set[int]] = {}
        self._tokens: dict[str, int] = {}
        # Tokens that open requests may come to, prompts included.
        self.num_tokens = 0

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._open

    def __len__(self) -> int:
        return len(self._open)

    def add(self, request: Request) -> None:
        tokens = len(request.prompt_token_ids) + request.max_tokens * request.num_samples
        self._open[request.request_id] = set(range(request.num_samples))
        self._tokens[request.request_id] = tokens
        self.num_tokens += tokens

    def drop(self, requests: Iterable[Request]) -> None:
        for request in requests:
            self._forget(request.request_id)

    def see(self, events: Sequence[TokenEvent]) -> None:
        """Take note of the samples that end with these events."""
        for event in events:
            if event.finish_reason is None:
                continue
            samples = self._open.get(event.request_id)
            if samples is not None:
                samples.discard(event.index)
                if not samples:
                    self._forget(event.request_id)

    def _forget(self, request_id: str) -> None:
        if self._open.pop(request_id, None) is not None:
            self.num_tokens -= self._tokens.pop(request_id)

    def fail(self, cause: str) -> list[TokenEvent]:
        """End all of them: their engine has stopped."""
        error = RequestError(cause, code="engine_stopped")
        events = [
            refusal(request_id, index, error)
            for request_id, samples in self._open.items()
            for index in sorted(samples)
        ]
        self._open.clear()
        self._tokens.clear()
        self.num_tokens = 0
        return events
