"""Which tile does a matrix-vector product take? A table of what won on an H100, and a rule for the rest.

A tile is (rows, columns, warps). Two rows of the table are a matter of bytes on their way: rows x columns x 2
bytes per program, times the programs that fit on a multiprocessor.
"""

from __future__ import annotations

import torch
from torch import Tensor

Tile = tuple[int, int, int]

# (outputs, inputs, is gated) of 16-bit weights.
TILES: dict[tuple[int, int, bool], Tile] = {}
DEFAULT: Tile = (4, 1024, 4)
DEFAULT_GATED: Tile = (2, 1024, 4)
DEFAULT_WIDE: Tile = (2, 512, 4)


def tile_of(weight_OI: Tensor, *, is_gated: bool) -> Tile:
    """Return the tile for a weight; a gated one has its gate and up rows stacked."""
    outputs, inputs = weight_OI.shape
    if weight_OI.dtype == torch.float32:
        return DEFAULT_WIDE
    return TILES.get((outputs, inputs, is_gated), DEFAULT_GATED if is_gated else DEFAULT)
