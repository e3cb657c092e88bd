"""What is asked of a server, and what came back? One record for each side of a request.

Times are seconds of one monotonic clock. A request counts from the moment it was due, so a client that is
late makes the server look slower, never faster, and says by how much it was late.
"""

from __future__ import annotations

import dataclasses
from array import array

Prompt = str | list[int]


@dataclasses.dataclass(frozen=True, slots=True)
class ServingRequest:
    """A prompt and how many tokens to generate; `due_s` after the start of the run, where a trace says so."""

    prompt: Prompt
    output_tokens: int
    due_s: float | None = None


@dataclasses.dataclass(slots=True)
class RequestRecord:
    """One request as its client saw it. Without `error_kind` it ended as the API promises.

    `piece_s` holds the arrival of each event that brought text; a piece may be several tokens. Token counts
    are those of the server's usage, None where it sent none.
    """

    due_s: float
    asked_tokens: int
    sent_s: float = 0.0
    end_s: float = 0.0
    piece_s: array[float] = dataclasses.field(default_factory=lambda: array("d"))
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    cached_tokens: int | None = None
    finish_reason: str | None = None
    error_kind: str | None = None
    error: str = ""

    def fail(self, kind: str, message: str) -> None:
        self.error_kind, self.error = kind, message

    @property
    def is_complete(self) -> bool:
        return self.error_kind is None

    @property
    def late_s(self) -> float:
        return self.sent_s - self.due_s

    @property
    def e2e_s(self) -> float:
        return self.end_s - self.due_s

    @property
    def ttft_s(self) -> float | None:
        return self.piece_s[0] - self.due_s if self.piece_s else None

    @property
    def tpot_s(self) -> float | None:
        """Mean time of each token after the first; None where there was no second, all came at once, or
        nobody counted.
        """
        if len(self.piece_s) < 2 or self.output_tokens is None or self.output_tokens < 2:
            return None
        return (self.piece_s[-1] - self.piece_s[0]) / (self.output_tokens - 1)

    def gaps_s(self) -> list[float]:
        """Return the times between pieces of text."""
        times = self.piece_s
        return [times[place] - times[place - 1] for place in range(1, len(times))]

    @property
    def disagreement(self) -> str | None:
        """Say how the usage contradicts the stream, None where it does not."""
        if not self.is_complete:
            return None
        if self.output_tokens is None:
            return "no usage"
        if len(self.piece_s) > self.output_tokens:
            return "more pieces of text than tokens"
        if self.output_tokens > self.asked_tokens:
            return "more tokens than asked for"
        if self.output_tokens == 0 and self.finish_reason == "length":
            return "ended by length without a token"
        return None
