"""Does a stream keep the protocol (R32)? A state machine over the events of one answer.

Role once and first (chat), text after it, exactly one finish reason a choice and nothing after it, usage once
and last where asked for and nowhere else, `[DONE]` once at the very end.
"""

from __future__ import annotations

import json
from typing import Any

DONE = "[DONE]"
SHARED = ("id", "object", "created", "model")


def split_events(text: str) -> list[tuple[str, str]]:
    """Return (event name, data) of each event; the name is "" where none is given."""
    assert text.endswith("\n\n"), repr(text[-80:])
    events: list[tuple[str, str]] = []
    for block in text[:-2].split("\n\n"):
        fields = [line.partition(": ") for line in block.split("\n")]
        assert all(name in ("data", "event") for name, _, _ in fields), block
        found = {name: value for name, _, value in fields}
        events.append((found.get("event", ""), found["data"]))
    return events


def read_events(text: str, *, num_choices: int = 1, has_usage: bool = False) -> list[Any]:
    """Return the parsed events of a whole stream, and assert that it kept the protocol."""
    events = split_events(text)
    assert [data for _, data in events].count(DONE) == 1 and events[-1] == ("", DONE)
    assert not any(name for name, _ in events)
    chunks = [json.loads(data) for _, data in events[:-1]]
    check_chunks(chunks, num_choices=num_choices, has_usage=has_usage)
    return chunks


def check_chunks(chunks: list[Any], *, num_choices: int, has_usage: bool) -> None:
    assert len({tuple(chunk[name] for name in SHARED) for chunk in chunks}) == 1
    is_chat = chunks[0]["object"] == "chat.completion.chunk"
    assert is_chat or chunks[0]["object"] == "text_completion"
    body = chunks
    if has_usage:
        *body, last = chunks
        assert last["choices"] == [] and last["usage"]["completion_tokens"] >= 0
    begun: set[int] = set()
    ended: set[int] = set()
    for chunk in body:
        assert len(chunk["choices"]) == 1
        assert not has_usage or "usage" in chunk
        assert has_usage or chunk.get("usage") is None or "total_tokens" in chunk["usage"]
        check_choice(chunk["choices"][0], begun, ended, is_chat)
    assert begun == ended == set(range(num_choices))


def check_choice(choice: dict[str, Any], begun: set[int], ended: set[int], is_chat: bool) -> None:
    index = choice["index"]
    assert index not in ended, "a choice goes on after its finish reason"
    if is_chat:
        assert ("role" in choice["delta"]) == (index not in begun), "the role comes once, and first"
    else:
        assert isinstance(choice["text"], str)
    begun.add(index)
    if choice["finish_reason"] is not None:
        assert choice["finish_reason"] in ("stop", "length", "timeout", "cancelled")
        ended.add(index)


def joined_text(chunks: list[Any], index: int = 0) -> str:
    """Return the text that a choice's chunks add up to."""
    choices = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
    return "".join(c["delta"].get("content") or "" if "delta" in c else c["text"] for c in choices)


def finish_reason(chunks: list[Any], index: int = 0) -> str:
    choices = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
    [reason] = [choice["finish_reason"] for choice in choices if choice["finish_reason"]]
    return reason
