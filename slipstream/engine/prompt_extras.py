# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""How do the extras of events become a user's records? Prompt logprobs and logits, joined over chunks.

Invariant: chunks come in the order of their positions, each position once, whatever was preempted meanwhile;
what is not complete yet is not shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from slipstream.core.outputs import Logprob
from slipstream.core.plan import TokenLogprobs
from slipstream.core.request import Request
from slipstream.text.base import Tokenizer

if TYPE_CHECKING:
    # Loaded only where logits are wanted: a door whose engine is elsewhere does without.
    import torch


class PromptExtras:
    """What a request wants of its prompt, growing; `logprobs` and `logits` are None until complete."""

    def __init__(self, request: Request, tokenizer: Tokenizer | None) -> None:
        self.logprobs: list[dict[int, Logprob] | None] | None = None
        self.logits: torch.Tensor | None = None
        self._tokenizer = tokenizer
        self._num_prompt = len(request.prompt_token_ids)
        # Nothing says how likely the first token was.
        self._entries: list[dict[int, Logprob] | None] = [None]
        self._rows: np.ndarray[Any, np.dtype[np.float32]] | None = None

    def take(self, extras: Sequence[tuple[str, int, Any]]) -> None:
        """Add the extras of one event of the first sample."""
        for what, start, values in extras:
            if what == "prompt_logprobs":
                self._take_logprobs(start, values)
            elif what == "context_logits":
                self._take_logits(start, values)

    def _take_logprobs(self, start: int, values: Sequence[TokenLogprobs]) -> None:
        """Position p says how likely token p + 1 is; the prompt's last position speaks of the output."""
        assert start == len(self._entries) - 1, "prompt positions come in order"
        of_prompt = values[: self._num_prompt - 1 - start]
        self._entries += [logprob_entry(logprobs, self._tokenizer) for logprobs in of_prompt]
        if start + len(values) == self._num_prompt:
            self.logprobs = self._entries

    def _take_logits(self, start: int, values: np.ndarray[Any, np.dtype[np.float32]]) -> None:
        if self._rows is None:
            self._rows = np.empty((self._num_prompt, values.shape[1]), dtype=np.float32)
        self._rows[start : start + len(values)] = values
        if start + len(values) == self._num_prompt:
            self.logits = _tensor(self._rows)


def logprob_entry(logprobs: TokenLogprobs, tokenizer: Tokenizer | None) -> dict[int, Logprob]:
    """Return the leading tokens of a position, likeliest first, and the token that stands there."""
    # This runs once a token, and its loop is the list of leaders: keep it flat.
    entry = {token: Logprob(value, rank) for rank, (token, value) in enumerate(logprobs.top, 1)}
    entry[logprobs.token_id] = Logprob(logprobs.logprob, logprobs.rank)
    if tokenizer is not None:
        for token, logprob in entry.items():
            logprob.decoded_token = tokenizer.token_text(token)
    return entry


def joined_logits(parts: Sequence[np.ndarray[Any, np.dtype[np.float32]]]) -> torch.Tensor | None:
    """Return [tokens, V] of single positions, or None where there was none."""
    return _tensor(np.concatenate(parts)) if parts else None


def _tensor(rows: np.ndarray[Any, np.dtype[np.float32]]) -> torch.Tensor:
    import torch

    return torch.from_numpy(rows)
