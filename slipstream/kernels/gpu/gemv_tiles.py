"""Which tile does a matrix-vector product take? A table of what won on an H100, and a rule for the rest.

A tile is (rows, columns, warps). The table is what `benchmarks/tune_gemv.py` printed; the rule follows its
pattern: two rows of wide tiles where there are more outputs than inputs, else four of narrower ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

Tile = tuple[int, int, int]

# (outputs, inputs, is gated) of 16-bit weights, in a graph with dependent launches: time, share of 3.02 TB/s.
TILES: dict[tuple[int, int, bool], Tile] = {
    (6144, 4096, False): (2, 2048, 4),  # 17.2 us, 97%
    (4096, 4096, False): (4, 1024, 2),  # 14.0 us, 79%
    (28672, 4096, True): (2, 2048, 8),  # 74.9 us, 104%
    (4096, 14336, False): (4, 1024, 4),  # 41.1 us, 95%
    (128256, 4096, False): (2, 2048, 8),  # 328.6 us, 106%
    # These four where they run: a block of them, with attention over 192, takes 21.7 us.
    (4096, 1024, False): (8, 1024, 8),
    (1024, 2048, False): (2, 2048, 8),
    (6144, 1024, True): (2, 512, 1),
    (1024, 3072, False): (2, 1024, 4),
    (151936, 1024, False): (4, 512, 4),  # 97.1 us, 106%
    # Llama-3.2-1B, as they run: a block takes 48.4 us, by the rule 53.0.
    (3072, 2048, False): (2, 1024, 4),
    (2048, 2048, False): (1, 1024, 4),
    (16384, 2048, True): (2, 1024, 4),
    (2048, 8192, False): (2, 1024, 2),
}
WIDE: Tile = (2, 2048, 8)
SQUARE: Tile = (4, 1024, 4)
SHORT: Tile = (4, 512, 4)
EXACT: Tile = (2, 512, 4)
FIRST_WIDE = 2048


def tile_of(weight_OI: Tensor, *, is_gated: bool) -> Tile:
    """Return the tile for a weight; a gated one has its gate and up rows stacked."""
    outputs, inputs = weight_OI.shape
    if weight_OI.dtype == torch.float32:
        return EXACT
    if inputs < FIRST_WIDE:
        rule = SHORT
    else:
        rule = WIDE if outputs > inputs and inputs % FIRST_WIDE == 0 else SQUARE
    return TILES.get((outputs, inputs, is_gated), rule)
