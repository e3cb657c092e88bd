"""Which token does a random row draw? Temperature, top-k, top-p, min-p, then the draw.

Three groups, by what a row asks: `draw_full` (temperature and min-p) never orders the vocabulary,
`draw_top_k` weighs only its candidates, `draw_top_p` weighs everything and orders as far as the nucleus
reaches (a GPU orders nothing: `kernels/gpu/nucleus.py`). A row's group follows from its own parameters and
every sum is of integers, so its token does not depend on its neighbours; the vocabulary-wide passes run over
slices of rows to bound their memory.

Order: temperature, top-k, top-p over the mass that top-k left, min-p relative to the most likely token. This
is transformers' order. vLLM applies min-p before top-k and top-p, so there the nucleus is of the mass above
min-p. Ties at the k-th place go to the lower id (transformers keeps every tied token, more than k).
Shapes: N rows of a group, V vocabulary, K candidates in descending order.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from slipstream.sampling.candidates import heavy, leading, runs_kernels, searched
from slipstream.sampling.weights import draw, passing, scale_bits, target_of, weigh

FIRST_CANDIDATES = 64
SLICE_ELEMENTS = 2**24
CPU_SLICE_ELEMENTS = 2**17


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


def slices(x_NV: Tensor, width: int | None = None) -> list[slice]:
    """Cut rows so that int64 intermediates of `width` (V unless given) columns stay small.

    A CPU keeps them in its cache; elsewhere one takes at most 128 MiB (or one row).
    """
    elements = CPU_SLICE_ELEMENTS if x_NV.device.type == "cpu" else SLICE_ELEMENTS
    num_rows, vocab_size = x_NV.shape
    step = max(1, elements // (width or vocab_size))
    return [slice(start, min(start + step, num_rows)) for start in range(0, num_rows, step)]


def draw_full(x_NV: Tensor, uniform_N: Tensor, params: FilterParams, *, has_min_p: bool) -> Tensor:
    """Return one token id per row, int64 [N], from all tokens (at or above min-p)."""
    if not runs_kernels(x_NV):
        return draw_full_by_tensors(x_NV, uniform_N, params, has_min_p=has_min_p)
    return judge_and_draw(x_NV, uniform_N, params, has_top_p=False, has_min_p=has_min_p)[0]


def draw_full_by_tensors(x_NV: Tensor, uniform_N: Tensor, params: FilterParams, *, has_min_p: bool) -> Tensor:
    """Return what `draw_full` does: the definition."""
    bits = scale_bits(x_NV.shape[1])
    drawn: list[Tensor] = []
    for rows in slices(x_NV):
        part, x = params.part(rows), x_NV[rows]
        weights = weigh(x, max_R=x.amax(-1), temperature_R=part.temperature_N, bits=bits)
        if has_min_p:
            weights.masked_fill_(weights < _min_weight(part.min_p_N, bits)[:, None], 0)
        drawn.append(draw(weights, uniform_N[rows]))
    return torch.cat(drawn)


def draw_top_k(x_NV: Tensor, uniform_N: Tensor, params: FilterParams, *, max_k: int) -> Tensor:
    """Return one token id per row, int64 [N]; every row has a top_k in 1..max_k."""
    vocab_size = x_NV.shape[1]
    bits, max_k = scale_bits(vocab_size), min(max_k, vocab_size)
    places = torch.arange(max_k, device=x_NV.device)
    drawn: list[Tensor] = []
    for rows in slices(x_NV, searched(vocab_size, max_k)):
        part = params.part(rows)
        values, ids = leading(x_NV[rows], max_k)
        weights = weigh(values, max_R=values[:, 0], temperature_R=part.temperature_N, bits=bits)
        weights.masked_fill_(places >= part.top_k_N[:, None], 0)
        drawn.append(draw_trimmed(weights, ids, weights.sum(-1), uniform_N[rows], part, bits))
    return torch.cat(drawn)


def draw_top_p(x_NV: Tensor, uniform_N: Tensor, params: FilterParams, *, has_min_p: bool = True) -> Tensor:
    """Return one token id per row, int64 [N]; no row has a top_k. A GPU has a kernel that orders nothing."""
    if not runs_kernels(x_NV):
        return draw_top_p_in_order(x_NV, uniform_N, params)
    return judge_and_draw(x_NV, uniform_N, params, has_top_p=True, has_min_p=has_min_p)[0]


def judge_and_draw(
    x_NV: Tensor, uniform_N: Tensor, params: FilterParams, *, has_top_p: bool, has_min_p: bool
) -> tuple[Tensor, Tensor]:
    """Return token ids and statuses, int8 [N], of rows without top_k, by one kernel of a GPU.

    A row whose status is not OK has token 0.
    """
    from slipstream.kernels.gpu import full_draw, nucleus

    bits = scale_bits(x_NV.shape[1])
    min_mass = _min_weight(params.min_p_N, bits) if has_min_p else None
    if has_top_p:
        columns = (params.temperature_N, params.top_p_N, min_mass, uniform_N)
        return nucleus.draw_nucleus(x_NV, *columns, bits=bits)
    return full_draw.draw_full(x_NV, params.temperature_N, min_mass, uniform_N, bits=bits)


def draw_top_p_in_order(x_NV: Tensor, uniform_N: Tensor, params: FilterParams) -> Tensor:
    """Return what `draw_top_p` does, by putting the leading tokens in order: the definition."""
    bits = scale_bits(x_NV.shape[1])
    drawn: list[Tensor] = []
    for rows in slices(x_NV):
        part, x = params.part(rows), x_NV[rows]
        weights = weigh(x, max_R=x.amax(-1), temperature_R=part.temperature_N, bits=bits)
        total = weights.sum(-1)
        needed = part.top_p_N * total.to(torch.float64)
        ordered, ids = nucleus_candidates(x, weights, needed)
        drawn.append(draw_trimmed(ordered, ids, total, uniform_N[rows], part, bits))
    return torch.cat(drawn)


def nucleus_candidates(x_NV: Tensor, weights_NV: Tensor, needed_N: Tensor) -> tuple[Tensor, Tensor]:
    """Return weights and ids [N, K] of leading tokens in order, whose mass reaches `needed_N`.

    A CPU tries a short list, then orders what is heavy enough to matter. An accelerator would have to wait
    for either answer, so it orders the vocabulary.
    """
    vocab_size = x_NV.shape[1]
    is_cpu = x_NV.device.type == "cpu"
    _, ids = leading(x_NV, min(FIRST_CANDIDATES, vocab_size) if is_cpu else vocab_size)
    ordered = weights_NV.gather(1, ids)
    if not is_cpu or bool((ordered.sum(-1) >= needed_N).all()):
        return ordered, ids
    # Tokens below this weight have less mass together than top-p leaves out, with a factor 2 for rounding.
    spare_N = weights_NV.sum(-1).to(torch.float64) - needed_N
    floor_N = (spare_N / (2 * vocab_size)).to(torch.int64)
    ids, is_padding = heavy(x_NV, weights_NV >= floor_N[:, None])
    return weights_NV.gather(1, ids).masked_fill_(is_padding, 0), ids


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
