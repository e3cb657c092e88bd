"""How could rows of a search go on? Their leading allowed tokens, with the model's own log-probabilities.

Invariant: masks decide which tokens are listed and nothing else: a logprob is the raw log-softmax over the
whole vocabulary, and ranks count every token, as in `logprobs.py`.
Shapes: C rows that ask, V vocabulary, K the longest list asked for.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slipstream.core.plan import Candidates
from slipstream.sampling.candidates import leading
from slipstream.sampling.weights import log_sum_exp


def pack_continuations(raw_CV: Tensor, allowed_CV: Tensor, *, count: int, with_ranks: bool) -> Tensor:
    """Return float64 [C, 3K] (K ids, K logprobs, K ranks; ids are exact), without synchronising.

    `allowed_CV` are the raw logits with -inf where a token is masked. Without ranks theirs are 0.
    """
    norm = log_sum_exp(raw_CV, max_R=raw_CV.amax(-1))[:, None]
    values, ids = leading(allowed_CV, count)
    ranks = torch.zeros_like(ids)
    if with_ranks:
        # Column by column: all at once would take K times the memory of the logits.
        above = [(raw_CV > values[:, k : k + 1]).sum(-1) for k in range(count)]
        ranks = torch.stack(above, dim=1) + 1
    return torch.cat([column.to(torch.float64) for column in (ids, values - norm, ranks)], dim=1)


def unpack_continuations(line: list[float], count: int) -> Candidates:
    """Read the first `count` continuations of one packed row."""
    width = len(line) // 3
    ids, logprobs, ranks = (line[part * width : part * width + count] for part in range(3))
    return Candidates([int(token) for token in ids], logprobs, [int(rank) for rank in ranks])
