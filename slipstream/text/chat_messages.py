"""Are these messages something a template may see?

A template runs on what a user sent, so everything is checked before: what a text-only model cannot honour is
refused by name, never dropped.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard, cast

from slipstream.core.errors import RequestError

# A role becomes part of the control text, so it may hold nothing that spells a control token.
ROLE = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,63}")
# Parts of one message are separate texts; templates of text models want one string.
PART_SEPARATOR = "\n"

Message = dict[str, Any]


def check_messages(messages: object) -> list[Message]:
    """Return the messages as plain data with string contents; raise RequestError naming what is wrong."""
    if not is_sequence(messages) or not messages:
        raise refuse("messages", f"a non-empty list of messages is needed, got {shown(messages)}")
    return [check_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def check_message(message: object, place: str) -> Message:
    if not isinstance(message, Mapping):
        raise refuse(place, f'a message is {{"role": ..., "content": ...}}, got {shown(message)}')
    checked = {str(key): value for key, value in cast(Mapping[object, Any], message).items()}
    role = checked.get("role")
    if not isinstance(role, str) or not ROLE.fullmatch(role):
        raise refuse(
            f"{place}.role",
            "a role is a word of letters, digits, '_' and '-', such as 'user', 'assistant' or 'system'; "
            f"got {shown(role)}",
        )
    calls = checked.get("tool_calls")
    if checked.get("content") is None and not (role == "assistant" and calls):
        raise refuse(f"{place}.content", "content is missing or null; give a string ('' for an empty one)")
    checked["content"] = check_content(checked.get("content"), f"{place}.content")
    if calls:
        checked["tool_calls"] = check_calls(calls, f"{place}.tool_calls")
    return checked


def check_content(content: object, place: str) -> str | None:
    if content is None or isinstance(content, str):
        return content
    if not is_sequence(content) or not content:
        raise refuse(place, f"content is a string or a non-empty list of text parts, got {shown(content)}")
    return PART_SEPARATOR.join(check_part(part, f"{place}[{i}]") for i, part in enumerate(content))


def check_part(part: object, place: str) -> str:
    if not isinstance(part, Mapping):
        raise refuse(place, f'a part is {{"type": "text", "text": ...}}, got {shown(part)}')
    fields = cast(Mapping[str, Any], part)
    kind, text = fields.get("type"), fields.get("text")
    if kind != "text":
        reason = f"parts of type {shown(kind)} are not served; allowed: 'text'"
        raise refuse(f"{place}.type", reason, "unsupported")
    if not isinstance(text, str):
        raise refuse(f"{place}.text", f"the text of a part is a string, got {shown(text)}")
    return text


def check_calls(calls: object, place: str) -> list[object]:
    if not is_sequence(calls):
        raise refuse(place, f"tool calls are a list, got {shown(calls)}")
    return [parse_arguments(call, f"{place}[{i}]") for i, call in enumerate(calls)]


def parse_arguments(call: object, place: str) -> object:
    """Return a tool call whose arguments are an object: over HTTP they are its JSON text."""
    if not isinstance(call, Mapping):
        raise refuse(place, f'a tool call is {{"function": {{...}}}}, got {shown(call)}')
    fields = cast(Mapping[str, Any], call)
    function = fields.get("function")
    if not isinstance(function, Mapping) or not isinstance(cast(Any, function).get("arguments"), str):
        return fields
    function = cast(Mapping[str, Any], function)
    try:
        arguments = json.loads(function["arguments"])
    except (ValueError, RecursionError) as error:
        raise refuse(f"{place}.function.arguments", f"arguments are not JSON ({error})") from error
    return {**fields, "function": {**function, "arguments": arguments}}


def is_sequence(value: object) -> TypeGuard[Sequence[object]]:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def refuse(param: str, reason: str, code: str = "invalid_value") -> RequestError:
    return RequestError(f"{param}: {reason}.", param=param, code=code)
