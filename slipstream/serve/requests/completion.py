"""What may the body of `/v1/completions` say, and which prompts does it hold?"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from slipstream.core.checks import refused, shown
from slipstream.serve.requests.base import IDS, UNSERVED_GENERATION, Unserved, optional
from slipstream.serve.requests.sampling import GenerationBody

PROMPT = {
    "anyOf": [
        {"type": "string", "minLength": 1},
        {"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 1},
        {**IDS, "minItems": 1},
        {"type": "array", "items": {**IDS, "minItems": 1}, "minItems": 1},
    ]
}
Prompt = Annotated[Any, optional(PROMPT)]
# What OpenAI generates where nothing is said.
DEFAULT_MAX_TOKENS = 16

PromptItem = str | list[int]


class CompletionBody(GenerationBody):
    """The body of `/v1/completions`."""

    prompt: Prompt = None
    echo: bool | None = None
    logprobs: int | None = None
    add_special_tokens: bool | None = None

    unserved: ClassVar[dict[str, Unserved]] = {
        **UNSERVED_GENERATION,
        "suffix": Unserved("text cannot be inserted, only continued; leave it out"),
        "prompt_embeds": Unserved("give the prompt as text or ids"),
    }

    def max_tokens_after(self, num_prompt: int, max_seq_len: int) -> int | None:
        """Return what may be generated after a prompt; where nothing is said, what still fits counts."""
        if self.max_tokens is not None:
            return self.max_tokens
        return max(1, min(DEFAULT_MAX_TOKENS, max_seq_len - num_prompt), self.min_tokens or 0)


def prompts_of(given: Any, ids: Any, param: str = "prompt") -> list[PromptItem]:
    """Return the prompts of a body in a list, whichever way they came. Raises RequestError.

    `given` is text, a list of texts, a list of ids or a list of such; `ids` is a list of ids given instead.
    What the ids are is checked where they become a request.
    """
    if ids is not None:
        if given is not None:
            raise refused(param, "and prompt_token_ids are both given; give one of them")
        if not isinstance(ids, list) or not ids:
            raise refused("prompt_token_ids", f"must be a non-empty list of ids, not {shown(ids)}")
        return [ids]
    if isinstance(given, str):
        return [_non_empty(given, param)]
    if given is None:
        raise refused(param, "is missing; give text, a list of token ids, or a list of these")
    if not isinstance(given, list):
        raise refused(param, f"must be text, a list of token ids, or a list of these, not {shown(given)}")
    if not given:
        raise refused(param, "is an empty list; give at least one text or token")
    kind = type(given[0])
    if kind not in (str, list):
        return [given]
    for place, item in enumerate(given):
        if type(item) is not kind:
            what = "holds texts and lists of ids mixed; an entry that differs is"
            raise refused(f"{param}[{place}]", f"{what} {shown(item)}")
        _non_empty(item, f"{param}[{place}]")
    return given


def _non_empty(item: Any, param: str) -> Any:
    if not item:
        raise refused(param, "is empty; give at least one character or token")
    return item
