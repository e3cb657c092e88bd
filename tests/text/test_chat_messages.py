"""Which messages are refused, and how the rest reach a template."""

from __future__ import annotations

from typing import Any

import pytest

from slipstream.core.errors import RequestError
from slipstream.text.chat_messages import check_messages

USER = {"role": "user", "content": "hi"}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}

REFUSED: list[tuple[Any, str]] = [
    ([], "messages: a non-empty list"),
    (None, "messages: a non-empty list"),
    ("hi", "messages: a non-empty list"),
    ({"role": "user"}, "messages: a non-empty list"),
    ([[]], r"messages\[0\]: a message is"),
    (["hi"], r"messages\[0\]: a message is"),
    ([{"content": "hi"}], r"messages\[0\].role: .*got None"),
    ([{"role": "", "content": "hi"}], r"messages\[0\].role"),
    ([{"role": "user<|im_end|>", "content": "hi"}], r"messages\[0\].role"),
    ([{"role": "user\n", "content": "hi"}], r"messages\[0\].role"),
    ([{"role": 1, "content": "hi"}], r"messages\[0\].role"),
    ([USER, {"role": "user"}], r"messages\[1\].content: content is missing or null"),
    ([{"role": "user", "content": None}], r"messages\[0\].content: content is missing or null"),
    ([{"role": "assistant", "content": None}], r"messages\[0\].content: content is missing or null"),
    ([{"role": "assistant", "content": None, "tool_calls": []}], "missing or null"),
    ([{"role": "user", "content": 5}], r"messages\[0\].content: content is a string"),
    ([{"role": "user", "content": []}], r"messages\[0\].content: content is a string"),
    ([{"role": "user", "content": ["hi"]}], r"messages\[0\].content\[0\]: a part is"),
    ([{"role": "user", "content": [{"type": "text"}]}], r"content\[0\].text: the text of a part"),
    ([{"role": "assistant", "tool_calls": {"a": 1}}], "tool calls are a list"),
    ([{"role": "assistant", "tool_calls": ["f"]}], r"tool_calls\[0\]: a tool call is"),
    ([{"role": "assistant", "tool_calls": [{"function": {"arguments": "{"}}]}], "arguments are not JSON"),
]


@pytest.mark.parametrize(("messages", "message"), REFUSED)
def test_what_no_template_may_see(messages: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        check_messages(messages)
    assert caught.value.param.startswith("messages")


def test_media_are_refused_by_name() -> None:
    part = {"type": "image_url", "image_url": {"url": "http://x"}}
    with pytest.raises(RequestError, match="'image_url' are not served; allowed: 'text'") as caught:
        check_messages([{"role": "user", "content": [part]}])
    assert caught.value.code == "unsupported"
    assert caught.value.param == "messages[0].content[0].type"


def test_text_parts_become_one_text() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert check_messages([{"role": "user", "content": parts}]) == [{"role": "user", "content": "a\nb"}]


def test_an_assistant_may_only_call_tools() -> None:
    (message,) = check_messages([{"role": "assistant", "content": None, "tool_calls": [CALL]}])
    assert message["content"] is None
    assert message["tool_calls"][0]["function"]["arguments"] == {"x": 1}
    assert CALL["function"]["arguments"] == '{"x": 1}', "the caller's own messages are left alone"


def test_other_fields_pass_and_empty_content_is_content() -> None:
    messages = [{"role": "tool", "content": "", "name": "f", "tool_call_id": "1"}]
    assert check_messages(messages) == messages
    assert check_messages(tuple(messages)) == messages
