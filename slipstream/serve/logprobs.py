"""How do log-probabilities look over HTTP? The two shapes of OpenAI's API, and the plain one for prompts.

Lists follow the tokens. A token of half a character shows as U+FFFD, with its own bytes beside where the
shape has a place for them. JSON has no infinity: what cannot happen is `LOWEST`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from slipstream.core.outputs import Logprob
from slipstream.text.base import Tokenizer

LOWEST = -9999.0

Entry = Mapping[int, Logprob]


class TokenNames:
    """How tokens are called: by their text, or `token_id:N` on request and where there is no tokenizer."""

    def __init__(self, tokenizer: Tokenizer | None, *, as_ids: bool) -> None:
        self._tokenizer = tokenizer
        self._pieces = tokenizer.byte_pieces if tokenizer is not None else None
        self._as_ids = as_ids or tokenizer is None

    def text(self, token_id: int, logprob: Logprob | None) -> str:
        if self._as_ids or self._tokenizer is None:
            return f"token_id:{token_id}"
        known = None if logprob is None else logprob.decoded_token
        return self._tokenizer.token_text(token_id) if known is None else known

    def utf8(self, token_id: int, logprob: Logprob) -> list[int]:
        """Return the bytes that a token stands for."""
        if self._pieces is not None:
            return list(self._pieces[token_id])
        return list((logprob.decoded_token or "").encode())


def finite(logprob: Logprob) -> float:
    return max(logprob.logprob, LOWEST)


def chat_logprobs(
    token_ids: Sequence[int], entries: Sequence[Entry], *, num_top: int, names: TokenNames
) -> dict[str, Any]:
    """Return the `logprobs` of a chat choice: exactly `num_top` of the likeliest beside each token."""

    def fields(token_id: int, logprob: Logprob) -> dict[str, Any]:
        return {
            "token": names.text(token_id, logprob),
            "logprob": finite(logprob),
            "bytes": names.utf8(token_id, logprob),
        }

    content = [
        {
            **fields(token_id, entry[token_id]),
            "top_logprobs": [fields(*item) for item in list(entry.items())[:num_top]],
        }
        for token_id, entry in zip(token_ids, entries, strict=True)
    ]
    return {"content": content, "refusal": None}


class CompletionLogprobs:
    """The `logprobs` of a completion choice, piece after piece: offsets count from the start of its text."""

    def __init__(self, *, num_top: int, names: TokenNames) -> None:
        self._num_top = num_top
        self._names = names
        self._offset = 0

    def take(self, token_ids: Sequence[int], entries: Sequence[Entry | None]) -> dict[str, Any]:
        """Return the fields for these tokens. An entry is None where nothing says how likely a token was."""
        tokens: list[str] = []
        offsets: list[int] = []
        values: list[float | None] = []
        tops: list[dict[str, float] | None] = []
        for token_id, entry in zip(token_ids, entries, strict=True):
            text = self._names.text(token_id, None if entry is None else entry[token_id])
            tokens.append(text)
            offsets.append(self._offset)
            values.append(None if entry is None else finite(entry[token_id]))
            tops.append(None if entry is None else self._top(token_id, entry))
            self._offset += len(text)
        return {"text_offset": offsets, "token_logprobs": values, "tokens": tokens, "top_logprobs": tops}

    def _top(self, token_id: int, entry: Entry) -> dict[str, float]:
        """Return the likeliest tokens and the one that stands there; of two with one text the likelier."""
        shown: dict[str, float] = {}
        for place, (other, logprob) in enumerate(entry.items()):
            if place < self._num_top or other == token_id:
                shown.setdefault(self._names.text(other, logprob), finite(logprob))
        return shown


def prompt_fields(entries: Sequence[Entry | None]) -> list[dict[str, Any] | None]:
    """Return `prompt_logprobs`: for each position the likeliest tokens by id, with rank and text."""
    return [
        None
        if entry is None
        else {
            str(token_id): {
                "logprob": finite(logprob),
                "rank": logprob.rank,
                "decoded_token": logprob.decoded_token,
            }
            for token_id, logprob in entry.items()
        }
        for entry in entries
    ]
