"""How likely did the model itself find a token? The raw log-softmax, before any bias, penalty or temperature.

Invariant: computed from exact integer masses, so a row's logprobs do not change with the batch around it.
Rank 1 is the most likely token; tokens of equal logit share the best rank, while the list of leading tokens
puts the lower id first. Shapes: L rows that ask, V vocabulary, K the longest list asked for.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slipstream.kernels.registration import has_triton
from slipstream.sampling.candidates import leading
from slipstream.sampling.filters import slices
from slipstream.sampling.weights import log_of_mass, log_sum_exp, scale_bits


def pack_logprobs(raw_LV: Tensor, token_ids_L: Tensor, status_L: Tensor, *, num_top: int) -> Tensor:
    """Return float64 [L, 4 + 2K] in the layout of `PackedLogprobs`, without synchronising."""
    parts = [_pack(raw_LV[rows], token_ids_L[rows], status_L[rows], num_top) for rows in slices(raw_LV)]
    return torch.cat(parts)


def _norm_and_rank(raw_LV: Tensor, chosen_L: Tensor) -> tuple[Tensor, Tensor]:
    """Return the log-sum-exp, float64 [L], and the rank of logits `chosen_L`; on a GPU in one pass."""
    max_L = raw_LV.amax(-1)
    if not raw_LV.is_cuda or not has_triton():
        return log_sum_exp(raw_LV, max_R=max_L), (raw_LV > chosen_L[:, None]).sum(-1) + 1
    from slipstream.kernels.gpu.nucleus import row_mass

    bits = scale_bits(raw_LV.shape[1])
    total_L, rank_L = row_mass(raw_LV, max_L, chosen_L, bits=bits)
    return log_of_mass(total_L, max_R=max_L, bits=bits), rank_L


def _pack(raw_LV: Tensor, token_ids_L: Tensor, status_L: Tensor, num_top: int) -> Tensor:
    chosen = raw_LV.gather(1, token_ids_L[:, None])
    norm, rank = (column[:, None] for column in _norm_and_rank(raw_LV, chosen[:, 0]))
    columns = [token_ids_L[:, None], chosen - norm, rank, status_L[:, None]]
    if num_top:
        values, ids = leading(raw_LV, num_top)
        columns += [ids, values - norm]
    return torch.cat([c.to(torch.float64) for c in columns], dim=1)
