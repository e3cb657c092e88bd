"""What does one server-sent event of an OpenAI-compatible stream say? Just what timing and counting need.

Invariant: the cost of an event is one split and one typed decode, about a microsecond, so that the client is
not what a benchmark measures. Fields nobody asked for are skipped unread. Format: WHATWG HTML, "Server-sent
events"; the OpenAI API reference, "Streaming".
"""

from __future__ import annotations

import msgspec

# Far above any chunk of text with its log-probabilities; what exceeds it is no event stream.
MAX_EVENT_BYTES = 16 << 20
DONE = b"[DONE]"


class StreamError(Exception):
    """A stream that is not what the API promises; `kind` is the word it is counted under."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class Choice(msgspec.Struct):
    text: str | None = None
    delta: Delta | None = None
    finish_reason: str | None = None

    @property
    def has_text(self) -> bool:
        delta = self.delta
        if delta is None:
            return bool(self.text)
        return bool(delta.content or delta.reasoning_content or delta.reasoning)


class PromptDetails(msgspec.Struct):
    cached_tokens: int | None = None


class Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: PromptDetails | None = None

    @property
    def cached_tokens(self) -> int | None:
        return None if self.prompt_tokens_details is None else self.prompt_tokens_details.cached_tokens


class Event(msgspec.Struct):
    choices: list[Choice] = []
    usage: Usage | None = None
    # Whatever shape a server gives it; an absent one is empty.
    error: msgspec.Raw = msgspec.Raw()

    @property
    def is_error(self) -> bool:
        return bytes(self.error) not in (b"", b"null")


_DECODER = msgspec.json.Decoder(Event)


def decode_event(payload: bytes) -> Event:
    """Decode one event's data. Raises StreamError for what is no chunk, and for an error in its place."""
    try:
        event = _DECODER.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise StreamError("malformed_event", f"{error}: {payload[:80]!r}") from None
    if event.is_error:
        raise StreamError("error_event", bytes(event.error)[:200].decode("utf-8", "replace"))
    return event


class EventSplitter:
    """Cuts a stream of bytes into the data of its events, wherever the network cut it."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[bytes]:
        """Return the data of every event that is now complete. Raises StreamError for an endless one."""
        data = self._rest + data
        if b"\r" in data:
            # A line end that the network cut in two stays in the rest, and is joined with its other half.
            data = data.replace(b"\r\n", b"\n")
        *events, self._rest = data.split(b"\n\n")
        if len(self._rest) > MAX_EVENT_BYTES:
            raise StreamError("malformed_event", f"an event exceeds {MAX_EVENT_BYTES} bytes")
        return [payload for event in events if (payload := data_of(event))]


def data_of(event: bytes) -> bytes:
    """Return the data of one event, empty where it has none (a comment, say)."""
    if event.startswith(b"data: ") and b"\n" not in event:
        return event[6:]
    lines = [line[5:].removeprefix(b" ") for line in event.split(b"\n") if line.startswith(b"data:")]
    return b"\n".join(lines)
