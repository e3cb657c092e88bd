"""Which token does a random row draw? Temperature, top-k, top-p, min-p, then the draw.

Three groups, by what a row asks: `draw_full` (temperature and min-p) never orders the vocabulary,
`draw_top_k` weighs only its candidates, `draw_top_p` weighs everything and orders as far as the nucleus
reaches. A row's group follows from its own parameters and every sum is of integers, so its token does not
depend on its neighbours; the vocabulary-wide passes run over slices of rows to bound their memory.

Order: temperature, top-k, top-p over the mass that top-k left, min-p relative to the most likely token. This
is transformers' order. vLLM applies min-p before top-k and top-p, so there the nucleus is of the mass above
min-p. Ties at the k-th place go to the lower id (both others keep every tied token, more than k).
Shapes: N rows of a group, V vocabulary, K candidates in descending order.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from slipstream.sampling.candidates import leading
from slipstream.sampling.weights import draw, passing, scale_bits, target_of, weigh

FIRST_CANDIDATES = 64
CANDIDATE_GROWTH = 8
SLICE_ELEMENTS = 2**25


@dataclasses.dataclass(slots=True)
class FilterParams:
    """Per-row parameters on the device: float32 temperature, float64 top_p and min_p, int64 top_k."""

    temperature_N: Tensor
    top_p_N: Tensor
    min_p_N: Tensor
    top_k_N: Tensor

    def part(self, rows: slice) -> FilterParams:
        return FilterParams(
            self.temperature_N[rows], self.top_p_N[rows], self.min_p_N[rows], self.top_k_N[rows]
        )


def slices(num_rows: int, vocab_size: int) -> list[slice]:
    """Cut rows so that one int64 pass over a slice takes at most 256 MiB (or one row)."""
    step = max(1, SLICE_ELEMENTS // vocab_size)
    return [slice(start, min(start + step, num_rows)) for start in range(0, num_rows, step)]


def draw_full(x_NV: Tensor, uniform_N: Tensor, params: FilterParams, *, has_min_p: bool) -> Tensor:
    """Return one token id per row, int64 [N], from all tokens (at or above min-p)."""
    bits = scale_bits(x_NV.shape[1])
    drawn: list[Tensor] = []
    for rows in slices(*x_NV.shape):
        part, x = params.part(rows), x_NV[rows]
        weights = weigh(x, max_R=x.amax(-1), temperature_R=part.temperature_N, bits=bits)
        if has_min_p:
            weights.masked_fill_(weights < _min_weight(part.min_p_N, bits)[:, None], 0)
        drawn.append(draw(weights, uniform_N[rows]))
    return torch.cat(drawn)


def draw_top_k(x_NV: Tensor, uniform_N: Tensor, params: FilterParams, *, max_k: int) -> Tensor:
    """Return one token id per row, int64 [N]; every row has a top_k in 1..max_k."""
    bits = scale_bits(x_NV.shape[1])
    values, ids = leading(x_NV, max_k)
    weights = weigh(values, max_R=values[:, 0], temperature_R=params.temperature_N, bits=bits)
    places = torch.arange(max_k, device=weights.device)
    weights.masked_fill_(places >= params.top_k_N[:, None], 0)
    return draw_trimmed(weights, ids, weights.sum(-1), uniform_N, params, bits)


def draw_top_p(x_NV: Tensor, uniform_N: Tensor, params: FilterParams) -> Tensor:
    """Return one token id per row, int64 [N]; no row has a top_k.

    A CPU lengthens the candidate list until every nucleus fits into it. An accelerator would have to wait for
    that answer, so it orders everything.
    """
    vocab_size = x_NV.shape[1]
    bits = scale_bits(vocab_size)
    drawn: list[Tensor] = []
    for rows in slices(*x_NV.shape):
        part, x = params.part(rows), x_NV[rows]
        max_x = x.amax(-1)
        total = weigh(x, max_R=max_x, temperature_R=part.temperature_N, bits=bits).sum(-1)
        needed = part.top_p_N * total.to(torch.float64)
        k = min(FIRST_CANDIDATES, vocab_size) if x.device.type == "cpu" else vocab_size
        while True:
            values, ids = leading(x, k)
            weights = weigh(values, max_R=max_x, temperature_R=part.temperature_N, bits=bits)
            if k == vocab_size or bool((weights.sum(-1) >= needed).all()):
                break
            k = min(k * CANDIDATE_GROWTH, vocab_size)
        drawn.append(draw_trimmed(weights, ids, total, uniform_N[rows], part, bits))
    return torch.cat(drawn)


def draw_trimmed(
    weights_NK: Tensor, ids_NK: Tensor, total_N: Tensor, uniform_N: Tensor, params: FilterParams, bits: int
) -> Tensor:
    """Keep the prefix that top-p and min-p leave of candidates in descending order, and draw from it."""
    ends = weights_NK.cumsum(-1)
    keep = trim(weights_NK, ends, total_N, params, bits)
    mass = (weights_NK * keep).sum(-1)
    place = passing(ends, target_of(uniform_N, mass))
    return ids_NK.gather(1, place[:, None])[:, 0]


def trim(weights_NK: Tensor, ends_NK: Tensor, total_N: Tensor, params: FilterParams, bits: int) -> Tensor:
    """Return bool [N, K], true on a prefix: the first candidate always, others while both filters hold.

    Top-p keeps a candidate while the mass before it is below p of the total: the smallest set that reaches p.
    """
    before = ends_NK - weights_NK
    needed = params.top_p_N * total_N.to(torch.float64)
    return (before < needed[:, None]) & (weights_NK >= _min_weight(params.min_p_N, bits)[:, None])


def _min_weight(min_p_N: Tensor, bits: int) -> Tensor:
    """The most likely token weighs 2^bits, so min-p is a bound on weights."""
    return (min_p_N * 2.0**bits).ceil().to(torch.int64)
