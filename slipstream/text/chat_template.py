"""How do messages become the text a chat model expects?

The template comes from the model's files and is as untrusted as they are: it runs in a sandbox in a killable
process, with a deadline and caps on source and output (`template_process`). Whatever goes wrong is this
request's error, never the engine's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from slipstream.core.errors import RequestError
from slipstream.text.chat_messages import check_messages
from slipstream.text.template_process import TemplateProcess, TemplateProcessError

DEADLINE_S = 3.0
MAX_SOURCE_CHARS = 1 << 20
MAX_OUTPUT_CHARS = 4 << 20
# Names a request may not set: they are arguments, special tokens, or functions of the environment.
RESERVED = frozenset(
    {"messages", "tools", "add_generation_prompt", "chat_template", "tokenize"}
    | {"bos_token", "eos_token", "unk_token", "pad_token"}
    | {"raise_exception", "strftime_now", "range", "dict", "lipsum", "cycler", "joiner", "namespace"}
)


class ChatTemplate:
    """A model's chat template. Thread-safe; `close` ends its process (so does losing the last reference).

    `special_tokens` are the names templates use (`bos_token`, `eos_token`, ...) with their texts.
    """

    def __init__(
        self, source: str, *, special_tokens: Mapping[str, str] | None = None, deadline_s: float = DEADLINE_S
    ) -> None:
        self.source = source
        self.special_tokens = dict(special_tokens or {})
        self._process = TemplateProcess(source, deadline_s=deadline_s, max_output=MAX_OUTPUT_CHARS)

    def render(
        self,
        messages: object,
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """Return the text of `messages`; further keyword arguments are variables of the template.

        Raises RequestError: code `template_error` where the template fails or refuses the messages,
        `invalid_value` or `unsupported` where the messages are wrong.
        """
        checked = self.check(messages, add_generation_prompt, tools, variables)
        return self.render_checked(checked)

    def check(
        self,
        messages: object,
        add_generation_prompt: bool,
        tools: Sequence[Mapping[str, Any]] | None,
        variables: Mapping[str, Any],
    ) -> dict[str, Any]:
        """Return the variables of one rendering that come from the request, as plain JSON data."""
        reserved = sorted(name for name in variables if name in RESERVED or name in self.special_tokens)
        if reserved:
            raise RequestError(
                f"Template variable {reserved[0]!r} cannot be set by a request; it is the model's or an "
                "argument of its own.",
                param="chat_template_kwargs",
            )
        given = {
            **variables,
            "messages": check_messages(messages),
            "tools": None if tools is None else list(tools),
            "add_generation_prompt": bool(add_generation_prompt),
        }
        try:
            return json.loads(json.dumps(given, allow_nan=False))
        except (TypeError, ValueError, RecursionError) as error:
            raise RequestError(
                f"Messages, tools and template variables must be plain JSON data ({error}).", param="messages"
            ) from error

    def render_checked(self, variables: dict[str, Any]) -> str:
        """Render with variables that `check` returned."""
        if len(self.source) > MAX_SOURCE_CHARS:
            raise failure(f"it has {len(self.source):,} characters; at most {MAX_SOURCE_CHARS:,} are allowed")
        try:
            answer = self._process.call({**self.special_tokens, **variables})
        except TemplateProcessError as error:
            raise failure(str(error)) from error
        if "error" in answer:
            raise failure(answer["error"])
        return answer["text"]

    def close(self) -> None:
        """End the process that renders. A later `render` starts a new one."""
        self._process.close()


def failure(reason: str) -> RequestError:
    return RequestError(
        f"The model's chat template failed: {reason.rstrip('.')}. Check that the messages fit this model, "
        "give another template, or send a raw prompt.",
        param="messages",
        code="template_error",
    )
