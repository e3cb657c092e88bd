"""Which ids does a chat become, if nobody may write control tokens but the template?

A user's text may spell one (`<|im_start|>`). Such spellings are found before rendering, and a character that
occurs nowhere else in the request is put between their letters. In the rendered text every control token
still intact is then the template's own and becomes its id; what lies between is encoded as ordinary text once
the marks are out. Without such a spelling the rendered text is encoded in one piece, so the ids are exactly
those of `tokenizer.encode(text, add_special_tokens=False)`.

The template alone decides about BOS, as it was written to: nothing is put in front of what it wrote. Limits:
a template that changes the letters of a message (`lower`) could make a control token out of other text.
"""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from slipstream.core.errors import RequestError
from slipstream.text.base import Tokenizer
from slipstream.text.chat_template import ChatTemplate

# Supplementary private use area A: no writing system, no vocabulary.
MARKS = range(0xF0000, 0xFFFFE)


@dataclasses.dataclass(frozen=True, slots=True)
class ChatPrompt:
    """A rendered chat and its ids."""

    text: str
    token_ids: list[int]


def encode_chat(
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    messages: object,
    *,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
    **variables: Any,
) -> ChatPrompt:
    """Render `messages` and encode them. Raises RequestError as `ChatTemplate.render` does.

    With `continue_final_message` the prompt ends with the last message's content, which the answer continues.
    """
    if template is None:
        raise RequestError(
            "This model has no chat template, so it cannot take messages. Send a raw prompt (generate or "
            "completions), or give a chat template.",
            param="messages",
            code="unsupported",
        )
    given = template.check(messages, add_generation_prompt, tools, variables)
    end = mark_end(given, template.source) if continue_final_message else ""
    if not spells_control(given, tokenizer):
        text = cut_at(end, template.render_checked(given))
        return ChatPrompt(text, tokenizer.encode(text, add_special_tokens=False))
    mark = unused_mark(given, template.source)
    split = map_strings(given, lambda text: split_control(text, tokenizer, mark))
    marked = cut_at(end, template.render_checked(split))
    return ChatPrompt(marked.replace(mark, ""), encode_marked(marked, mark, tokenizer))


def mark_end(given: dict[str, Any], source: str) -> str:
    """Put a mark at the end of the last message's content, and return it. Raises RequestError."""
    last = given["messages"][-1]
    if not isinstance(last["content"], str):
        raise RequestError("The last message has no text that could be continued.", param="messages")
    end = unused_mark(given, source)
    last["content"] += end
    return end


def cut_at(end: str, text: str) -> str:
    """Return a rendered text up to the mark of its last message's end, all of it without a mark."""
    if not end:
        return text
    before, found, _ = text.rpartition(end)
    if not found:
        raise RequestError(
            "The model's chat template does not show the last message's content, so it cannot be continued.",
            param="messages",
            code="template_error",
        )
    return before.replace(end, "")


def encode_marked(marked: str, mark: str, tokenizer: Tokenizer) -> list[int]:
    ids: list[int] = []
    start = 0
    for span in tokenizer.find_control(marked):
        ids += encode_between(marked[start : span.start], mark, tokenizer, start == 0)
        ids.append(span.token_id)
        start = span.stop
    return ids + encode_between(marked[start:], mark, tokenizer, start == 0)


def encode_between(marked: str, mark: str, tokenizer: Tokenizer, is_start: bool) -> list[int]:
    text = marked.replace(mark, "")
    return tokenizer.encode_ordinary(text, is_start=is_start) if text else []


def split_control(text: str, tokenizer: Tokenizer, mark: str) -> str:
    """Put `mark` after each character of every control token that `text` spells."""
    parts: list[str] = []
    start = 0
    for span in tokenizer.find_control(text):
        parts.append(text[start : span.start])
        parts += [character + mark for character in text[span.start : span.stop]]
        start = span.stop
    return "".join([*parts, text[start:]])


def spells_control(value: object, tokenizer: Tokenizer) -> bool:
    return any(tokenizer.find_control(text) for text in strings(value))


def unused_mark(value: object, source: str) -> str:
    """Return a character that neither the request nor the template holds."""
    used = set(source).union(*strings(value))
    while True:
        mark = chr(secrets.choice(MARKS))
        if mark not in used:
            return mark


def strings(value: object) -> list[str]:
    """Return every string in plain JSON data, keys included."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        entries = cast(dict[str, object], value)
        return [*entries, *(text for item in entries.values() for text in strings(item))]
    if isinstance(value, list):
        return [text for item in cast(list[object], value) for text in strings(item)]
    return []


def map_strings(value: Any, change: Callable[[str], str]) -> Any:
    """Return plain JSON data with every string changed, keys included."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        entries = cast(dict[str, Any], value)
        return {change(key): map_strings(item, change) for key, item in entries.items()}
    if isinstance(value, list):
        return [map_strings(item, change) for item in cast(list[Any], value)]
    return value
