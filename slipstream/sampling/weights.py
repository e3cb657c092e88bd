"""How much mass does a token have, exactly? Softmax terms as integers, and the draw from them.

Invariant: sums of integers do not depend on the order of summation, so totals, cumulative masses and draws of
a row are bit-identical alone and in any batch, on any device whose `exp` gives the same bits; floating sums
are not. A token's weight is floor(2^s exp((x - max) / T)): the most likely token weighs 2^s, whatever lies
below 2^-s of it weighs 0 and is never drawn. s = 62 - ceil(log2 V) (44 for 262,144 tokens), so no total
overflows.
Shapes: R rows, V vocabulary, N weights per row.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

BLOCK = 256


def scale_bits(vocab_size: int) -> int:
    """Return s such that `vocab_size` weights of 2^s fit an int64."""
    return 62 - (vocab_size - 1).bit_length()


def weigh(x_RN: Tensor, *, max_R: Tensor, temperature_R: Tensor | None, bits: int) -> Tensor:
    """Return int64 weights [R, N] of float32 logits; `max_R` is the row's largest logit, T None is 1."""
    scaled = x_RN - max_R[:, None]
    if temperature_R is not None:
        scaled.div_(temperature_R[:, None])
    return scaled.exp_().mul_(2.0**bits).to(torch.int64)


def log_sum_exp(x_RV: Tensor, *, max_R: Tensor) -> Tensor:
    """Return float64 [R], independent of the number of rows."""
    bits = scale_bits(x_RV.shape[1])
    total_R = weigh(x_RV, max_R=max_R, temperature_R=None, bits=bits).sum(-1)
    return max_R.to(torch.float64) + total_R.to(torch.float64).log() - bits * math.log(2.0)


def target_of(uniform_R: Tensor, total_R: Tensor) -> Tensor:
    """Return floor(u * total) in [0, total), as int64; total is positive."""
    target = (uniform_R * total_R.to(torch.float64)).to(torch.int64)
    return torch.minimum(target, total_R - 1)


def draw(weights_RN: Tensor, uniform_R: Tensor) -> Tensor:
    """Return the index [R] of the first weight at which the cumulative weight passes u * total.

    A weight of 0 adds nothing to the cumulative sum, so its index is never returned. Sums go over blocks
    first, then inside the chosen block: one pass over memory instead of a scan of it.
    """
    width = weights_RN.shape[1]
    padding = -width % BLOCK
    if padding:
        weights_RN = torch.nn.functional.pad(weights_RN, (0, padding))
    num_rows, padded = weights_RN.shape
    blocks = weights_RN.view(num_rows, padded // BLOCK, BLOCK)
    mass = blocks.sum(-1)
    ends = mass.cumsum(-1)
    target = target_of(uniform_R, ends[:, -1])
    block = passing(ends, target)
    target = target - (ends - mass).gather(1, block[:, None])[:, 0]
    chosen = blocks.gather(1, block[:, None, None].expand(-1, 1, BLOCK))[:, 0]
    return (block * BLOCK + passing(chosen.cumsum(-1), target)).clamp_(max=width - 1)


def passing(ends_RN: Tensor, target_R: Tensor) -> Tensor:
    """Return the first index [R] whose cumulative weight exceeds the target, at most N - 1."""
    index = torch.searchsorted(ends_RN, target_R[:, None], right=True)[:, 0]
    return index.clamp_(max=ends_RN.shape[1] - 1)
