"""What may the body of `/v1/chat/completions` say, and what its messages?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from slipstream.core.checks import refused, shown
from slipstream.core.errors import RequestError, nearest
from slipstream.serve.errors import ApiError
from slipstream.serve.requests.base import UNSERVED_CHAT, UNSERVED_GENERATION, Unserved, optional
from slipstream.serve.requests.sampling import GenerationBody

MEDIA = "media are not served; send text"
CONTENT = {
    "anyOf": [
        {"type": "string"},
        {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "required": ["type", "text"],
                "additionalProperties": False,
                "properties": {"type": {"enum": ["text"]}, "text": {"type": "string"}},
            },
        },
    ]
}
MESSAGES = {
    "type": "array",
    "minItems": 1,
    "items": {
        "type": "object",
        "required": ["role", "content"],
        "additionalProperties": False,
        "properties": {
            "role": {"type": "string", "pattern": "^[A-Za-z][A-Za-z0-9_-]{0,63}$"},
            "content": CONTENT,
            "name": {"type": "string"},
        },
    },
}
Messages = Annotated[Any, optional(MESSAGES)]
Variables = Annotated[Any, optional({"type": "object"})]
MESSAGE_FIELDS = ("role", "content", "name")
# Of an answer that comes back as history; null there.
UNSERVED_MESSAGE = {
    "tool_calls": "tools cannot be called yet",
    "tool_call_id": "tools cannot be called yet",
    "function_call": "tools cannot be called yet",
    "audio": MEDIA,
    "refusal": "leave it out",
    "annotations": "leave it out",
    "reasoning": "leave it out",
    "reasoning_content": "leave it out",
}
MAX_MESSAGES = 4096


class ChatBody(GenerationBody):
    """The body of `/v1/chat/completions`."""

    messages: Messages = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: Variables = None

    unserved: ClassVar[dict[str, Unserved]] = {
        **UNSERVED_GENERATION,
        **UNSERVED_CHAT,
        "audio": Unserved(MEDIA),
        "modalities": Unserved(MEDIA, (["text"],)),
        "media_io_kwargs": Unserved(MEDIA),
        "prediction": Unserved("leave it out"),
        "reasoning_effort": Unserved("set what the template reads by chat_template_kwargs"),
        "reasoning": Unserved("set what the template reads by chat_template_kwargs"),
        "include_reasoning": Unserved("answers come as the model writes them", (True,)),
        "verbosity": Unserved("ask for it in a message"),
        "web_search_options": Unserved("nothing is searched"),
        "prompt_cache_key": Unserved("prefixes are reused by themselves; cache_salt keeps them apart"),
        "prompt_cache_retention": Unserved("prefixes are reused by themselves"),
        "safety_identifier": Unserved("nothing is kept of users"),
        "moderation": Unserved("leave it out"),
        "echo": Unserved("use /v1/completions", (False,)),
    }

    @property
    def longest(self) -> int | None:
        """The bound on the answer, None to fill the context. Raises RequestError where two differ."""
        old, new = self.max_tokens, self.max_completion_tokens
        if old is not None and new is not None and old != new:
            what = f"is {shown(old)} and max_completion_tokens is {shown(new)}; they mean the same, give one"
            raise refused("max_tokens", what)
        return new if old is None else old

    @property
    def num_logprobs(self) -> int | None:
        """How many tokens are named beside each, None for no log-probabilities. Raises RequestError."""
        if self.top_logprobs is not None and not self.logprobs:
            raise refused("top_logprobs", "needs logprobs=true; set it, or leave top_logprobs out")
        return (self.top_logprobs or 0) if self.logprobs else None

    def check_chat(self) -> None:
        """Refuse what does not go together. Raises RequestError."""
        if self.add_special_tokens:
            what = "is true, and a chat's special tokens are the template's to write; leave it out"
            raise refused("add_special_tokens", what)
        if self.continue_final_message and self.add_generation_prompt:
            what = "is true, and so is add_generation_prompt, which starts another message; give one"
            raise refused("continue_final_message", what)


def check_message_fields(messages: Any, param: str = "messages") -> None:
    """Refuse what a message may not hold, by name; roles and contents are checked by `text.chat_messages`.

    Raises RequestError.
    """
    if not isinstance(messages, list) or not messages:
        raise refused(param, f"must be a non-empty list of messages, not {shown(messages)}")
    if len(messages) > MAX_MESSAGES:
        raise refused(param, f"has {len(messages)} entries, at most {MAX_MESSAGES} are allowed; shorten it")
    for place, message in enumerate(messages):
        where = f"{param}[{place}]"
        if not isinstance(message, dict):
            raise refused(where, f"must be an object with role and content, not {shown(message)}")
        _check_one(message, where)


def _check_one(message: dict[str, Any], where: str) -> None:
    for name in [name for name in message if name not in MESSAGE_FIELDS]:
        advice = UNSERVED_MESSAGE.get(name)
        if advice is None:
            raise refused(where, f"has no field {name[:64]!r};{nearest(name[:64], MESSAGE_FIELDS)}")
        # null, or an empty list of an answer that came back: nothing is asked for.
        if message.pop(name):
            raise RequestError(
                f"{where}.{name} is not served by this version; {advice}.",
                param=where.partition("[")[0],
                code="unsupported",
            )
    if message.get("role") in ("tool", "function"):
        raise RequestError(
            f"{where}.role {message['role']!r} is not served by this version; tools cannot be called yet.",
            param=where.partition("[")[0],
            code="unsupported",
        )
    if "name" in message and not isinstance(message["name"], str):
        raise refused(where, f"has a name that is {shown(message['name'])}; it must be a string")
    content = message.get("content")
    if isinstance(content, list):
        _check_parts(content, where)


def _check_parts(parts: list[Any], where: str) -> None:
    for place, part in enumerate(parts):
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(kind, str) and kind != "text":
            raise RequestError(
                f"{where}.content[{place}] is of type {shown(kind)}, which is not served; {MEDIA}.",
                param=where.partition("[")[0],
                code="unsupported",
            )
        extra = [name for name in part if name not in ("type", "text")] if isinstance(part, dict) else []
        if extra:
            raise refused(where, f"has a part with the field {extra[0][:64]!r}; a part holds type and text")


def check_template_kwargs(given: Any, readable: frozenset[str]) -> Mapping[str, Any]:
    """Return the variables a request sets for the template. Raises ApiError for one it may not set.

    `readable` are those that the template looks at and a request may set: any other would be ignored.
    """
    if given is None:
        return {}
    if not isinstance(given, dict):
        raise refused("chat_template_kwargs", f"must be an object, not {shown(given)}")
    allowed = sorted(readable)
    for name in given:
        if name in allowed:
            continue
        short = name[:64]
        what = f"allowed: {', '.join(allowed)}" if allowed else "this model's template takes none"
        message = f"chat_template_kwargs has no variable {short!r}; {what}.{nearest(short, allowed)}"
        raise ApiError(400, message, param="chat_template_kwargs", code="invalid_value")
    return given
