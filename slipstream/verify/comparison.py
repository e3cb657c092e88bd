"""How far apart are two tensors, and how far is too far?

The measure is the largest relative error of a line: |given - expected| / |expected| in the 2-norm over the
last dimension, where a line that is far smaller than the rest is held against the rest. A maximum over lines
shows the one wrong row of a batch, which a norm over everything would hide.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

# Rounding one result costs up to 2^-24, 2^-11 and 2^-8 of its size; a sum of many rounded products some
# multiples of that. Wrong kernels and weights miss by far more.
OP_TOLERANCE = {"float32": 1e-4, "float16": 4e-3, "bfloat16": 3e-2}
# A block of ops rounds between them; its own error is bounded by a few of theirs.
BLOCK_TOLERANCE = {"float32": 1e-3, "float16": 1.5e-2, "bfloat16": 1e-1}
# A line smaller than this share of the root mean square line is rounding noise by itself.
MIN_LINE = 0.05


@dataclasses.dataclass(slots=True)
class Check:
    """What is known of one module: how often it ran, its worst error, and in which forward that was."""

    name: str
    kind: str
    tolerance: float
    calls: int = 0
    worst: float = 0.0
    forward: int = 0

    @property
    def is_good(self) -> bool:
        return self.worst <= self.tolerance

    def add(self, error: float, forward: int) -> None:
        self.calls += 1
        if error > self.worst or (math.isnan(error) and not math.isnan(self.worst)):
            self.worst, self.forward = error, forward


def relative_error(given: Tensor, expected: Tensor) -> float:
    """Return the measure above, infinity for another shape and NaN where `given` holds one. Blocks."""
    if given.shape != expected.shape:
        return math.inf
    if not given.numel():
        return 0.0
    lines = expected.shape[-1] if expected.ndim else 1
    expected_RC = expected.double().reshape(-1, lines)
    missed_R = (given.double().reshape(-1, lines) - expected_RC).norm(dim=1)
    size_R = expected_RC.norm(dim=1)
    usual = size_R.square().mean().sqrt()
    return float((missed_R / torch.maximum(size_R, MIN_LINE * usual).clamp_min(1e-30)).max())
