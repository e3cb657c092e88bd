"""How likely did the model itself find a token? The raw log-softmax, before any bias, penalty or temperature.

Invariant: computed from exact integer masses, so a row's logprobs do not change with the batch around it.
Rank 1 is the most likely token; tokens of equal logit share the best rank, while the list of leading tokens
puts the lower id first. Shapes: L rows that ask, V vocabulary, K the longest list asked for.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slipstream.sampling.candidates import leading
from slipstream.sampling.filters import slices
from slipstream.sampling.weights import log_sum_exp


def pack_logprobs(raw_LV: Tensor, token_ids_L: Tensor, status_L: Tensor, *, num_top: int) -> Tensor:
    """Return float64 [L, 4 + 2K] in the layout of `PackedLogprobs`, without synchronising."""
    parts = [_pack(raw_LV[rows], token_ids_L[rows], status_L[rows], num_top) for rows in slices(raw_LV)]
    return torch.cat(parts)


def _pack(raw_LV: Tensor, token_ids_L: Tensor, status_L: Tensor, num_top: int) -> Tensor:
    norm = log_sum_exp(raw_LV, max_R=raw_LV.amax(-1))[:, None]
    chosen = raw_LV.gather(1, token_ids_L[:, None])
    rank = (raw_LV > chosen).sum(-1, keepdim=True) + 1
    columns = [token_ids_L[:, None], chosen - norm, rank, status_L[:, None]]
    if num_top:
        values, ids = leading(raw_LV, num_top)
        columns += [ids, values - norm]
    return torch.cat([c.to(torch.float64) for c in columns], dim=1)
