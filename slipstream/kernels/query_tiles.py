"""How many queries of a span does one program of a GPU's attention take? Planner and kernel must agree."""

from __future__ import annotations

import torch

# Where the cache of a step's attention plan keeps its tiles; whoever runs captured steps fills them in.
TILES = "tiles"


def tile_queries(dtype: torch.dtype) -> int:
    """Return how many queries a tile holds on a GPU.

    64 in 16 bits: on an H100 four such programs on a multiprocessor beat two of 128 by a fifth and more.
    """
    return 32 if dtype == torch.float32 else 64
