"""Which random number belongs to (seed, sample, position)? Philox4x32-10, the same on every device.

Invariant: the number is a pure function of its counter and key, so a row's noise depends on no neighbour, no
step number and no generator state; a preempted row continues as if nothing had happened. Source: Salmon,
Moraes, Dror, Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011, section 3.3; pinned by the
known-answer vectors the authors publish. 32-bit words live in int64, whose product wraps to the low 64 bits
that the algorithm wants.
"""

from __future__ import annotations

import torch
from torch import Tensor

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
WORD = 0xFFFFFFFF
ROUNDS = 10


def key_words(seed: int) -> tuple[int, int]:
    """Split a 64-bit seed into the key's two words, low first."""
    return seed & WORD, seed >> 32 & WORD


class Philox:
    """The generator's constants on one device. Calls never synchronise."""

    def __init__(self, device: torch.device) -> None:
        self._multipliers = torch.tensor(MULTIPLIERS, device=device).view(2, 1)
        rounds = torch.arange(ROUNDS).view(ROUNDS, 1, 1)
        self._key_steps = (rounds * torch.tensor(KEY_STEPS).view(1, 2, 1)).to(device)

    def words(self, counter_4N: Tensor, key_2N: Tensor) -> Tensor:
        """Return the four output words [4, N] of N counters; words are int64 in [0, 2^32)."""
        keys = (key_2N + self._key_steps) & WORD
        even, odd = counter_4N[0::2], counter_4N[1::2]
        for key in keys.unbind(0):
            product = even * self._multipliers
            even = (product >> 32 & WORD).flip(0).bitwise_xor_(odd).bitwise_xor_(key)
            odd = (product & WORD).flip(0)
        return torch.stack((even[0], odd[0], even[1], odd[1]))

    def uniform(self, key_2N: Tensor, sample_idx_N: Tensor, position_N: Tensor) -> Tensor:
        """Return float64 [N] in [0, 1) with 53 random bits; the counter is (position, sample index, 0, 0)."""
        zero = torch.zeros_like(position_N)
        words = self.words(torch.stack((position_N & WORD, sample_idx_N, zero, zero)), key_2N)
        bits = (words[0] >> 5) * 2**26 + (words[1] >> 6)
        return bits.to(torch.float64) * 2.0**-53
