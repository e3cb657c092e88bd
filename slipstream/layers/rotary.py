"""How do a step's positions become rotary tables? Frequencies once, angles as far as a sequence has reached.

P positions of the table, F frequencies, H head size, T tokens. Invariant: the table covers every position the
step's plan allows for; it grows by doubling, by the host's bound alone, so nothing waits for the device.
Sources: Su et al., RoFormer, arXiv 2104.09864; Chen et al., arXiv 2306.15595 (linear scaling); the Llama 3.1
reference code (llama3 scaling); Peng et al., YaRN, arXiv 2309.00071, sections 3.2 and 3.4.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from slipstream.core.batch import ForwardBatch
from slipstream.core.errors import ConfigError
from slipstream.kernels.rotary import rotary_table
from slipstream.layers.build_context import BuildContext
from slipstream.layers.parameter import Parameter
from slipstream.layers.rope_config import RopeConfig

FIRST_POSITIONS = 1024


class Rotary(nn.Module):
    """One rotary embedding, shared by every layer that turns the same way.

    Where only a part of the head turns, the rest has frequency 0. Raises ConfigError for such a part in the
    layout of halves, whose pairs lie head_dim / 2 apart.
    """

    def __init__(
        self, build: BuildContext, config: RopeConfig, *, head_dim: int, interleaved: bool = False
    ) -> None:
        super().__init__()
        if config.rotary_dim and not interleaved:
            raise ConfigError(
                f"rotary_dim is {config.rotary_dim} of a head of {head_dim}; a part of the head turns only "
                "in interleaved pairs."
            )
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
        return self.table(batch.attention_plan.max_seq_len).index_select(0, batch.positions_kT[0])

    def table(self, needed: int) -> Tensor:
        """Return the [P, 2, H] float32 table of at least `needed` positions."""
        if self._table_P2H is None or self._table_P2H.shape[0] < needed:
            self._table_P2H = self._make_table(needed)
        return self._table_P2H

    def _make_table(self, needed: int) -> Tensor:
        size = max(FIRST_POSITIONS, 1 << (needed - 1).bit_length())
        positions = torch.arange(size, dtype=torch.float32, device=self.device)
        frequencies = inverse_frequencies(self.config, self.head_dim).to(self.device)
        if self.factors is not None:
            frequencies = frequencies / self.factors
        table_P2H = rotary_table(torch.outer(positions, frequencies), self.interleaved)
        factor = self.config.attention_factor
        return table_P2H if factor == 1.0 else table_P2H.mul_(factor)


def inverse_frequencies(config: RopeConfig, head_dim: int) -> Tensor:
    """Return the [F] float32 frequencies, scaled as `config` says (without a checkpoint's factors)."""
    rotary_dim = config.rotary_dim or head_dim
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim
    frequencies = 1.0 / (config.theta**exponents)
    if rotary_dim < head_dim:
        frequencies = torch.cat((frequencies, torch.zeros((head_dim - rotary_dim) // 2)))
    if config.kind == "linear":
        return frequencies / config.factor
    if config.kind == "llama3":
        return _scale_llama3(frequencies, config)
    if config.kind == "yarn":
        return _scale_yarn(frequencies, config, head_dim)
    return frequencies


def _scale_llama3(frequencies: Tensor, config: RopeConfig) -> Tensor:
    """Divide long wavelengths by the factor, keep short ones, and blend in between."""
    wavelengths = 2 * math.pi / frequencies
    low, high = config.low_freq_factor, config.high_freq_factor
    turns = config.original_positions / wavelengths
    smooth = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - smooth) * frequencies / config.factor + smooth * frequencies


def _scale_yarn(frequencies: Tensor, config: RopeConfig, head_dim: int) -> Tensor:
    """Keep the frequencies of many turns, divide those of few by the factor, ramp between them."""

    def index_of(turns: float) -> float:
        """Return the index, as a real number, of the frequency that turns so often in the original length."""
        wavelength = config.original_positions / turns
        return head_dim * math.log(wavelength / (2 * math.pi)) / (2 * math.log(config.theta))

    first, last = index_of(config.beta_fast), index_of(config.beta_slow)
    if config.is_ramp_whole:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    width = last - first or 1e-3
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - first) / width).clamp(0.0, 1.0)
    return frequencies / config.factor * ramp + frequencies * (1 - ramp)
