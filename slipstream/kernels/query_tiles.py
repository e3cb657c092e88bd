"""How many queries of a span does one program of a GPU's attention take? Planner and kernel must agree."""

from __future__ import annotations

import torch


def tile_queries(dtype: torch.dtype, head_dim: int) -> int:
    """Return how many queries a tile holds on a GPU: as many as its registers take."""
    if dtype == torch.float32:
        return 32
    return 128 if head_dim <= 128 else 64
