"""How likely did the model itself find a token? The raw log-softmax, before any bias, penalty or temperature.

Invariant: computed from exact integer masses, so a row's logprobs do not change with the batch around it.
Rank 1 is the most likely token; tokens of equal logit share the best rank, while the list of leading tokens
puts the lower id first. Shapes: L rows that ask, V vocabulary, K the longest list asked for.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from slipstream.sampling.candidates import leading, runs_kernels
from slipstream.sampling.filters import slices
from slipstream.sampling.weights import log_sum_exp, scale_bits


@dataclasses.dataclass(slots=True)
class Leaders:
    """The leading logits [L, K] of rows and their ids, in order."""

    values_LK: Tensor
    ids_LK: Tensor

    @classmethod
    def of(cls, raw_LV: Tensor, k: int) -> Leaders:
        return cls(*leading(raw_LV, k))

    def first(self) -> tuple[Tensor, Tensor]:
        return self.values_LK[:, 0], self.ids_LK[:, 0]


def pack_logprobs(
    raw_LV: Tensor, token_ids_L: Tensor, status_L: Tensor, *, num_top: int, leaders: Leaders | None = None
) -> Tensor:
    """Return float64 [L, 4 + 2K] in the layout of `PackedLogprobs`, without synchronising.

    On a GPU `leaders` are the `num_top` leaders where they are known already.
    """
    if runs_kernels(raw_LV):
        if num_top and leaders is None:
            leaders = Leaders.of(raw_LV, num_top)
        return _pack_by_kernel(raw_LV, token_ids_L, status_L, leaders)
    return pack_logprobs_by_tensors(raw_LV, token_ids_L, status_L, num_top=num_top)


def pack_logprobs_by_tensors(
    raw_LV: Tensor, token_ids_L: Tensor, status_L: Tensor, *, num_top: int
) -> Tensor:
    """Return what `pack_logprobs` does: the definition."""
    parts: list[Tensor] = []
    for rows in slices(raw_LV):
        found = Leaders.of(raw_LV[rows], num_top) if num_top else None
        parts.append(_pack(raw_LV[rows], token_ids_L[rows], status_L[rows], found))
    return torch.cat(parts)


def _pack_by_kernel(raw_LV: Tensor, token_ids_L: Tensor, status_L: Tensor, leaders: Leaders | None) -> Tensor:
    from slipstream.kernels.gpu.row_logprobs import row_logprobs

    bits = scale_bits(raw_LV.shape[1])
    if leaders is None:
        return row_logprobs(raw_LV, token_ids_L, status_L, raw_LV.amax(-1), None, bits=bits)
    listed = (leaders.values_LK, leaders.ids_LK)
    return row_logprobs(raw_LV, token_ids_L, status_L, leaders.values_LK[:, 0], listed, bits=bits)


def _pack(raw_LV: Tensor, token_ids_L: Tensor, status_L: Tensor, leaders: Leaders | None) -> Tensor:
    chosen = raw_LV.gather(1, token_ids_L[:, None])
    norm = log_sum_exp(raw_LV, max_R=raw_LV.amax(-1))[:, None]
    rank = (raw_LV > chosen).sum(-1, keepdim=True) + 1
    columns = [token_ids_L[:, None], chosen - norm, rank, status_L[:, None]]
    if leaders is not None:
        columns += [leaders.ids_LK, leaders.values_LK - norm]
    return torch.cat([c.to(torch.float64) for c in columns], dim=1)
