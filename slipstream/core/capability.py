"""What can an implementation do? Upper rooms read capabilities, never names."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Capability:
    """Base of every room's capability record. `min_sm` is the compute capability x 10, 0 without a GPU."""

    devices: frozenset[str] = frozenset({"cpu", "cuda"})
    min_sm: int = 0
