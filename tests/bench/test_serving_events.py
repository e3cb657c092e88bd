"""Is a stream of events cut and read the same, wherever the network cuts it?"""

from __future__ import annotations

import pytest

from slipstream.bench import serving_events
from slipstream.bench.serving_events import DONE, EventSplitter, StreamError, decode_event

STREAM = (
    b': ping\n\ndata: {"choices":[{"index":0,"text":"a\xc3\xa9"}]}\n\n'
    b'event: x\ndata:{"choices":[],\ndata: "usage":null}\n\ndata: [DONE]\n\n'
)
EVENTS = [b'{"choices":[{"index":0,"text":"a\xc3\xa9"}]}', b'{"choices":[],\n"usage":null}', DONE]


@pytest.mark.parametrize("line_end", [b"\n", b"\r\n"])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_events_do_not_depend_on_the_cuts(line_end: bytes, size: int) -> None:
    stream = STREAM.replace(b"\n", line_end)
    splitter = EventSplitter()
    found = [e for i in range(0, len(stream), size) for e in splitter.feed(stream[i : i + size])]
    assert found == EVENTS


def test_an_endless_event_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving_events, "MAX_EVENT_BYTES", 100)
    splitter = EventSplitter()
    splitter.feed(b"data: " + b"x" * 90)
    with pytest.raises(StreamError, match="exceeds 100 bytes"):
        splitter.feed(b"x" * 90)


@pytest.mark.parametrize(
    ("payload", "has_text"),
    [
        (b'{"choices":[{"index":0,"text":"x"}]}', True),
        (b'{"choices":[{"index":0,"text":""}]}', False),
        (b'{"choices": [{"delta": {"content": "x"}, "logprobs": {"content": []}}]}', True),
        (b'{"choices":[{"delta":{"role":"assistant","content":""}}]}', False),
        (b'{"choices":[{"delta":{"reasoning_content":"x"}}]}', True),
        (b'{"choices":[{"delta":{}}],"error":null}', False),
    ],
)
def test_only_text_counts(payload: bytes, has_text: bool) -> None:
    assert [choice.has_text for choice in decode_event(payload).choices] == [has_text]


def test_usage() -> None:
    usage = decode_event(
        b'{"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":4,"total_tokens":7,'
        b'"prompt_tokens_details":{"cached_tokens":2}}}'
    ).usage
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens) == (3, 4, 2)


@pytest.mark.parametrize(
    ("payload", "kind"),
    [
        (b"{", "malformed_event"),
        (b"[]", "malformed_event"),
        (b'{"choices":[{"text":1}]}', "malformed_event"),
        (b'{"error":{"message":"engine stopped"}}', "error_event"),
        (b'{"error":"engine stopped"}', "error_event"),
    ],
)
def test_what_is_no_chunk(payload: bytes, kind: str) -> None:
    with pytest.raises(StreamError) as raised:
        decode_event(payload)
    assert raised.value.kind == kind
