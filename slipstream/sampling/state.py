"""What does the device remember of each row between steps? Parameters, noise key, output length.

Invariant: the device is the truth for lengths; the host writes a row once, at admission, and afterwards only
`advance`, or a step that draws inside (`step_draws.py`), changes it. Shapes: R sampled rows; the tables have
one line per row of the engine.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slipstream.core.sampling_params import RowSampling
from slipstream.sampling.philox import key_words

TEMPERATURE, TOP_P, MIN_P, REPETITION, PRESENCE, FREQUENCY = range(6)
KEY_LOW, KEY_HIGH, SAMPLE_IDX, TOP_K, MIN_TOKENS, SLOT, NUM_TOP = range(7)
NO_SLOT = -1


def to_device(
    values: list[int] | list[float] | list[list[int]] | list[list[float]],
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """Copy host numbers to the device without waiting (from pinned memory on a GPU)."""
    host = torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda")
    return host.to(device, non_blocking=True)


class RowTable:
    """float64 and int64 columns (named above) of every row, and the number of tokens each has generated.

    The tables stay where they are. Rows written are copied together, before anybody reads: where all rows of
    captured steps are greedy, none ever is.
    """

    def __init__(self, *, max_rows: int, device: torch.device) -> None:
        self._device = device
        self._floats = torch.zeros(max_rows, 6, dtype=torch.float64, device=device)
        self._ints = torch.zeros(max_rows, 7, dtype=torch.int64, device=device)
        self._position = torch.zeros(max_rows, dtype=torch.int64, device=device)
        self._written: dict[int, list[float]] = {}

    @property
    def floats(self) -> Tensor:
        self.flush()
        return self._floats

    @property
    def ints(self) -> Tensor:
        self.flush()
        return self._ints

    @property
    def position(self) -> Tensor:
        self.flush()
        return self._position

    def write(
        self, row: int, sampling: RowSampling, *, seed: int, sample_idx: int, position: int, slot: int
    ) -> None:
        """Set everything of a row, for whoever reads it next."""
        s = sampling
        floats = [
            s.temperature,
            s.top_p,
            s.min_p,
            s.repetition_penalty,
            s.presence_penalty,
            s.frequency_penalty,
        ]
        # Whole numbers below 2^53 are exact in float64.
        ints = [*key_words(seed), sample_idx, s.top_k, s.min_tokens, slot, s.logprobs]
        self._written[row] = [row, *floats, *ints, position]

    def flush(self) -> None:
        """Copy what was written; a captured step reads the tables where they stand."""
        if not self._written:
            return
        packed = to_device(list(self._written.values()), torch.float64, self._device)
        self._written = {}
        rows = packed[:, 0].to(torch.int64)
        self._floats.index_copy_(0, rows, packed[:, 1:7])
        self._ints.index_copy_(0, rows, packed[:, 7:14].to(torch.int64))
        self._position.index_copy_(0, rows, packed[:, 14].to(torch.int64))

    def advance(self, rows_R: Tensor, ones_R: Tensor) -> None:
        """Count one more output token for distinct rows."""
        self.position.index_add_(0, rows_R, ones_R)

    def is_early(self, rows_R: Tensor) -> Tensor:
        """Return bool [R]: which rows have generated fewer tokens than their `min_tokens`."""
        return self.position.index_select(0, rows_R) < self.ints.index_select(0, rows_R)[:, MIN_TOKENS]
