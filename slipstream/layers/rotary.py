"""How do a step's positions become rotary tables? Frequencies once, angles as far as a sequence has reached.

P positions of the table, F frequencies, H head size, T tokens. Invariant: the table covers every position the
step's plan allows for; it grows by doubling, by the host's bound alone, so nothing waits for the device.
Sources: Su et al., RoFormer, arXiv 2104.09864; Chen et al., arXiv 2306.15595 (linear scaling); the Llama 3.1
reference code (llama3 scaling).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from slipstream.core.batch import ForwardBatch
from slipstream.kernels.rotary import rotary_table
from slipstream.layers.build_context import BuildContext
from slipstream.layers.parameter import Parameter
from slipstream.layers.rope_config import RopeConfig

FIRST_POSITIONS = 1024


class Rotary(nn.Module):
    """One rotary embedding, shared by every layer that turns the same way."""

    def __init__(
        self, build: BuildContext, config: RopeConfig, *, head_dim: int, interleaved: bool = False
    ) -> None:
        super().__init__()
        self.config, self.interleaved = config, interleaved
        self.device = torch.device(build.device)
        self.head_dim = head_dim
        self.factors: Parameter | None = None
        if config.has_factors:
            self.factors = Parameter.create((head_dim // 2,), dtype=torch.float32, device=build.device)
        # Not a buffer: it is derived, sized by use, and must not be saved or moved with the weights.
        self._table_P2H: Tensor | None = None

    def forward(self, batch: ForwardBatch) -> Tensor:
        """Return the [T, 2, H] float32 table rows of the batch's positions."""
        needed = batch.attention_plan.max_seq_len
        if self._table_P2H is None or self._table_P2H.shape[0] < needed:
            self._table_P2H = self._make_table(needed)
        return self._table_P2H.index_select(0, batch.positions_kT[0])

    def _make_table(self, needed: int) -> Tensor:
        size = max(FIRST_POSITIONS, 1 << (needed - 1).bit_length())
        positions = torch.arange(size, dtype=torch.float32, device=self.device)
        frequencies = inverse_frequencies(self.config, self.head_dim).to(self.device)
        if self.factors is not None:
            frequencies = frequencies / self.factors
        return rotary_table(torch.outer(positions, frequencies), self.interleaved)


def inverse_frequencies(config: RopeConfig, head_dim: int) -> Tensor:
    """Return the [F] float32 frequencies, scaled as `config` says (without a checkpoint's factors)."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    frequencies = 1.0 / (config.theta**exponents)
    if config.kind == "linear":
        return frequencies / config.factor
    if config.kind == "llama3":
        return _scale_llama3(frequencies, config)
    return frequencies


def _scale_llama3(frequencies: Tensor, config: RopeConfig) -> Tensor:
    """Divide long wavelengths by the factor, keep short ones, and blend in between."""
    wavelengths = 2 * math.pi / frequencies
    low, high = config.low_freq_factor, config.high_freq_factor
    turns = config.original_positions / wavelengths
    smooth = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - smooth) * frequencies / config.factor + smooth * frequencies
