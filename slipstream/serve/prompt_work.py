"""How do a body's texts and messages become ids? On worker threads: tokenizing and rendering take time.

Invariant: a text is measured before it is tokenized. One of more bytes than `max_seq_len` of the longest
token cannot fit the context, whatever the tokenizer makes of it.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.meta

from slipstream.core.checks import check_text, refused
from slipstream.core.errors import ConfigError, RequestError
from slipstream.core.limits import Limits
from slipstream.engine.prompts import Encoded
from slipstream.engine.service import EngineService
from slipstream.text.base import Tokenizer
from slipstream.text.chat_messages import is_sequence
from slipstream.text.chat_template import RESERVED
from slipstream.text.template_worker import build_environment

MAX_TEMPLATE_CHARS = 1 << 20


class PromptWork:
    """A model's tokenizer and template as the routes use them. Any thread may use it."""

    def __init__(self, service: EngineService) -> None:
        self._service = service
        self._tokenizer = _tokenizer_of(service)

    @functools.cached_property
    def max_text_bytes(self) -> int:
        """The size above which no text fits the context."""
        if self._tokenizer is None:
            return 0
        return self._service.info.limits.max_seq_len * longest_token_bytes(self._tokenizer)

    @functools.cached_property
    def template_variables(self) -> frozenset[str]:
        """What a request may set for the template: the names it reads, but those that are not its own."""
        source = self._tokenizer.chat_template if self._tokenizer is not None else None
        if self._tokenizer is None or not source or len(source) > MAX_TEMPLATE_CHARS:
            return frozenset()
        return variables_of(source) - RESERVED - set(self._tokenizer.special_tokens)

    def encode(self, prompt: str | list[int], *, add_special_tokens: bool, param: str = "prompt") -> Encoded:
        """Turn a text or ids into a prompt. Raises RequestError, or ConfigError without a tokenizer."""
        if not isinstance(prompt, str):
            return Encoded(prompt)
        self.check_size(prompt, param)
        tokenizer = self._service.prompts.tokenizer
        ids = tokenizer.encode(prompt, add_special_tokens=add_special_tokens)
        if not ids:
            raise refused(param, "has no tokens; give text that has some")
        return Encoded(ids, prompt)

    def encode_chat(
        self,
        messages: list[dict[str, Any]],
        *,
        add_generation_prompt: bool,
        continue_final_message: bool,
        variables: Mapping[str, Any],
    ) -> Encoded:
        """Render a conversation and turn it into ids. Raises RequestError."""
        self.check_size("".join(_texts(messages)), "messages")
        extra = {**variables, "continue_final_message": True} if continue_final_message else variables
        encoded = self._service.prompts.encode_chat(messages, add_generation_prompt, extra)
        if encoded.error is not None:
            error = encoded.error
            raise RequestError(error.message, param=error.param.partition("[")[0], code=error.code)
        return encoded

    def check_size(self, text: str, param: str) -> None:
        if not text:
            return
        check_text(text, param, None)
        size, bound = len(text.encode()), self.max_text_bytes
        if bound and size > bound:
            limits: Limits = self._service.info.limits
            raise RequestError(
                f"{param} has {size} bytes; a context of {limits.max_seq_len} tokens holds at most {bound}; "
                "shorten it.",
                param=param,
                code="context_length_exceeded",
            )


def _tokenizer_of(service: EngineService) -> Tokenizer | None:
    try:
        return service.prompts.tokenizer
    except ConfigError:
        return None


def longest_token_bytes(tokenizer: Tokenizer) -> int:
    """Return the bytes of the longest token's text."""
    pieces = tokenizer.byte_pieces
    ids = range(tokenizer.vocab_size)
    if pieces is not None:
        return max(1, max(len(pieces[token_id]) for token_id in ids))
    return max(1, max(len(tokenizer.token_text(token_id).encode()) for token_id in ids))


def variables_of(source: str) -> frozenset[str]:
    """Return the names that a template reads without setting them; none where it cannot be parsed."""
    try:
        return frozenset(jinja2.meta.find_undeclared_variables(build_environment().parse(source)))
    except (jinja2.TemplateError, RecursionError):
        return frozenset()


def _texts(messages: Sequence[Mapping[str, Any]]) -> list[str]:
    texts: list[str] = []
    for message in messages:
        content = message.get("content")
        parts = content if is_sequence(content) else [content]
        for part in parts:
            text = part.get("text") if isinstance(part, Mapping) else part
            if isinstance(text, str):
                texts.append(text)
    return texts
