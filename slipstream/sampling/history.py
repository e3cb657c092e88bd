"""Which tokens does what came before forbid? Repeated n-grams, and the last token of a bad sequence.

The history is the runner's own token buffer, read on the device, so a step may be launched before the host
knows the last token. An n-gram counts over prompt and output, as transformers' no_repeat_ngram_size; a bad
sequence over the output alone, as vLLM's bad_words.

Invariant: several rules may name one token; masking is a minimum, so their order does not matter.
Shapes: R rows of the step, V vocabulary, W tokens of history, N rows of one n-gram size, S sequences of M.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor


@dataclasses.dataclass(slots=True)
class TokenHistory:
    """Tokens [rows, longest] and their number [rows] of every row of the engine; read here, never written."""

    tokens: Tensor
    lengths: Tensor


@dataclasses.dataclass(slots=True)
class NgramRule:
    """Batch rows `index_N`, engine rows `rows_N`, that share one n-gram size."""

    size: int
    index_N: Tensor
    rows_N: Tensor
    rows: list[int]


@dataclasses.dataclass(slots=True)
class SequenceRule:
    """Bad sequences without their last id [S, M] (padded), their lengths, and what each one masks.

    `places_S` are places (batch row * V + last id) of the flattened logits.
    """

    prefix_SM: Tensor
    length_S: Tensor
    rows_S: Tensor
    places_S: Tensor


def mask_repeats(logits_RV: Tensor, history: TokenHistory, rule: NgramRule, *, width: int) -> None:
    """Mask every token that would complete an n-gram of the row's first `width` tokens a second time."""
    size = rule.size
    num_starts = width - size + 1
    if num_starts <= 0:
        return
    tokens_NW = history.tokens[:, :width].index_select(0, rule.rows_N).to(torch.int64)
    length_N = history.lengths.index_select(0, rule.rows_N)[:, None]
    starts = torch.arange(num_starts, device=logits_RV.device)
    # The whole n-gram lies within the tokens that the row has.
    matches = starts + size <= length_N
    for place in range(size - 1):
        tail = tokens_NW.gather(1, (length_N - size + 1 + place).clamp_(min=0))
        matches &= tokens_NW[:, place : place + num_starts] == tail
    x_NV = logits_RV.index_select(0, rule.index_N)
    x_NV.scatter_reduce_(1, tokens_NW[:, size - 1 :], _ceiling(matches), "amin")
    logits_RV.index_copy_(0, rule.index_N, x_NV)


def mask_completions(
    logits_RV: Tensor, history: TokenHistory, rule: SequenceRule, *, num_outputs_S: Tensor
) -> None:
    """Mask the last id of each sequence whose other ids end the row's output."""
    places = torch.arange(rule.prefix_SM.shape[1], device=logits_RV.device)
    length_S1 = rule.length_S[:, None]
    start_S1 = history.lengths.index_select(0, rule.rows_S)[:, None] - length_S1
    columns_SM = (start_S1 + places).clamp_(min=0, max=history.tokens.shape[1] - 1)
    last_SM = history.tokens[rule.rows_S[:, None], columns_SM]
    is_same = (last_SM == rule.prefix_SM) | (places >= length_S1)
    matches = is_same.all(1) & (num_outputs_S >= rule.length_S)
    logits_RV.view(-1).scatter_reduce_(0, rule.places_S, _ceiling(matches), "amin")


def _ceiling(is_masked: Tensor) -> Tensor:
    """Return float32 bounds: -inf where masked, +inf where not."""
    return torch.where(is_masked, -torch.inf, torch.inf).to(torch.float32)
