"""How does a prompt of any accepted form become token ids? For every door alike.

Invariant: what is wrong with one prompt is an `Encoded.error` of that prompt, never an exception that would
lose the others of its batch.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Any, cast

from slipstream.core.errors import ConfigError, RequestError
from slipstream.core.sampling_params import SamplingParams
from slipstream.text.base import Tokenizer
from slipstream.text.chat_prompt import encode_chat
from slipstream.text.chat_template import ChatTemplate

logger = logging.getLogger(__name__)

Prompt = str | Sequence[int] | Mapping[str, Any]
Message = Mapping[str, Any]
PROMPT_KEYS = ("prompt", "prompt_token_ids")


@dataclasses.dataclass(frozen=True, slots=True)
class Encoded:
    """A prompt as ids, or why it cannot be: an error here is this prompt's alone."""

    token_ids: list[int]
    text: str | None = None
    error: RequestError | None = None


class PromptEncoder:
    """A model's tokenizer and chat template, either of which may be missing. Any thread may use it."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._template = chat_template_of(tokenizer)

    @property
    def tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            raise ConfigError(
                "This LLM has no tokenizer: it was started with skip_tokenizer_init=True, or with "
                "load_format='dummy' from a folder without one. Give token ids as prompts, or name a folder "
                "with tokenizer=..."
            )
        return self._tokenizer

    def encode(self, prompt: Prompt) -> Encoded:
        """Turn a prompt of any accepted form into ids; a failure becomes this prompt's error."""
        try:
            text, token_ids = split_prompt(prompt)
            if token_ids is None:
                assert text is not None
                token_ids = self._tokenize(text)
            return Encoded(token_ids, text)
        except (RequestError, ConfigError) as error:
            return Encoded([], prompt if isinstance(prompt, str) else None, _own(error))

    def encode_bad(self, text: str) -> list[list[int]]:
        """Return the ids of a bad text as a tokenizer spells it inside a text, alone and after a space."""
        word = text.strip()
        spellings = {text: None, " " + text.lstrip(): None} if word else {text: None}
        return [self.tokenizer.encode_ordinary(spelling, is_start=False) for spelling in spellings]

    def _tokenize(self, text: str) -> list[int]:
        if not text:
            raise RequestError("The prompt is empty; give at least one character or token.", param="prompt")
        try:
            return self.tokenizer.encode(text)
        except (RequestError, ConfigError):
            raise
        except Exception as error:
            logger.exception("tokenizing a prompt failed")
            raise RequestError(
                f"The prompt cannot be tokenized: {type(error).__name__}.", param="prompt"
            ) from error

    def encode_chat(
        self, messages: Sequence[Message], add_generation_prompt: bool, template_kwargs: Mapping[str, Any]
    ) -> Encoded:
        """Render a conversation with the model's template and turn it into ids."""
        try:
            chat = encode_chat(
                self.tokenizer,
                self._template,
                messages,
                add_generation_prompt=add_generation_prompt,
                **template_kwargs,
            )
            return Encoded(chat.token_ids, chat.text)
        except (RequestError, ConfigError) as error:
            return Encoded([], None, _own(error))

    def close(self) -> None:
        """End the template's process. Idempotent."""
        if self._template is not None:
            self._template.close()


def _own(error: RequestError | ConfigError) -> RequestError:
    """Return an error as one of its prompt: without a tokenizer only prompts of ids can be served."""
    if isinstance(error, RequestError):
        return error
    return RequestError(str(error), param="prompt", code="unsupported")


def chat_template_of(tokenizer: Tokenizer | None) -> ChatTemplate | None:
    """Return a model's own chat template, or None where it has none."""
    if tokenizer is None or not tokenizer.chat_template:
        return None
    return ChatTemplate(tokenizer.chat_template, special_tokens=tokenizer.special_tokens)


def split_prompts(prompts: Any) -> tuple[list[Prompt], bool]:
    """Return (list of prompts, whether one was given by itself). A list of ids is one prompt."""
    if isinstance(prompts, (str, Mapping)):
        return [prompts], True
    given = cast(Sequence[Any], prompts) if isinstance(prompts, Sequence) else ()
    if not len(given):
        raise RequestError(
            "No prompt was given; pass a string, a list of token ids, {'prompt': ...}, "
            "{'prompt_token_ids': ...} or a non-empty list of these.",
            param="prompt",
        )
    if all(isinstance(item, (str, Mapping, Sequence)) for item in given):
        return list(given), False
    return [given], True


def split_prompt(prompt: Any) -> tuple[str | None, list[int] | None]:
    """Return (text, ids) of one prompt, one of the two at most None. Raises RequestError."""
    if isinstance(prompt, str):
        return prompt, None
    if isinstance(prompt, Mapping):
        fields = cast(Mapping[Any, Any], prompt)
        unknown = [key for key in fields if key not in PROMPT_KEYS]
        if unknown or not fields:
            raise RequestError(
                f"A prompt dictionary has the keys {', '.join(PROMPT_KEYS)}; given: {list(fields)}.",
                param="prompt",
            )
        text, ids = fields.get("prompt"), fields.get("prompt_token_ids")
        if (text is None and ids is None) or (text is not None and not isinstance(text, str)):
            raise RequestError("'prompt' must be a string, or give 'prompt_token_ids'.", param="prompt")
        return text, ids
    if isinstance(prompt, Sequence):
        return None, cast(list[int], prompt)
    raise RequestError(
        f"A prompt is a string, a list of token ids or a dictionary, not {type(prompt).__name__}.",
        param="prompt",
    )


def spread_params(
    params: SamplingParams | Sequence[SamplingParams] | None, count: int
) -> Sequence[SamplingParams]:
    """Give each of `count` prompts its parameters. Raises RequestError where the counts differ."""
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if len(params) != count:
        raise RequestError(
            f"{len(params)} sampling_params for {count} prompts; give one for all, or one for each.",
            param="sampling_params",
        )
    return params
