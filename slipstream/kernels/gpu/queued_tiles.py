"""In which tiles do tokens meet a matrix with the same bits, and which matrices can? A table and a rule.

The table is what won on an NVIDIA H100 80GB HBM3 (`benchmarks/fixed_matmul.py` prints its rows). The rule
takes the widest tile of which there are enough for all multiprocessors: the wider, the fewer bytes for the
same work.
Invariant: whether a matrix is met so follows from the matrix alone, never from the tokens: another kernel has
other bits. Among the tiles tokens have the rows of the matrix unit, however few they are.
"""

from __future__ import annotations

import functools

import torch
import triton
from torch import Tensor

from slipstream.kernels.gpu.queued_matmul import Tile, is_aligned

CAPABILITY = (9, 0)
# The sizes of the table; a step takes the next larger one, or the last.
SIZES = (16, 64, 128, 256, 512, 2048, 8192)
# By (rows of the weight, inputs, is gated, tokens) of 16-bit weights.
TILES: dict[tuple[int, int, bool, int], Tile] = {}

# From the widest on; a gated tile has its outputs twice, gate and up.
RULE = (
    Tile(128, 256, 64, 4, 8, in_turn=True),
    Tile(128, 128, 64, 5, 8, in_turn=True),
    Tile(128, 64, 128, 4, 8, ahead=2),
    Tile(64, 128, 64, 8, 4, ahead=2),
    Tile(64, 64, 128, 5, 4, ahead=2),
    Tile(64, 32, 128, 8, 4, ahead=2),
    Tile(64, 16, 128, 9, 4, ahead=2),
)
GATED_RULE = (
    Tile(128, 128, 64, 4, 8, in_turn=True),
    Tile(128, 64, 64, 5, 8, in_turn=True),
    Tile(64, 64, 128, 4, 4),
    Tile(64, 32, 128, 6, 4, ahead=2),
    Tile(64, 16, 128, 8, 4, ahead=2),
)
# With fewer tiles a narrower one keeps more multiprocessors at work.
MIN_TILES = 96


def tile_of(tokens: int, weight_OI: Tensor, *, is_gated: bool) -> Tile:
    """Return the tile for so many tokens."""
    rows, inputs = weight_OI.shape
    size = next((size for size in SIZES if tokens <= size), SIZES[-1])
    tile = TILES.get((rows, inputs, is_gated, size))
    return tile or rule_of(tokens, rows // 2 if is_gated else rows, is_gated=is_gated)


def rule_of(tokens: int, outputs: int, *, is_gated: bool) -> Tile:
    """Return the widest tile that is not half empty and of which there are enough, or the narrowest."""
    rule = GATED_RULE if is_gated else RULE
    for tile in rule:
        token_tiles = triton.cdiv(tokens, tile.tokens)
        is_full = tile.tokens <= rule[-1].tokens or tokens > rule[-1].tokens
        if is_full and token_tiles * triton.cdiv(outputs, tile.outputs) >= MIN_TILES:
            return tile
    return rule[-1]


def can_queue(weight_OI: Tensor) -> bool:
    """Say whether a matrix is met by `queued_matmul`: 16 bits, aligned, compute capability 9.0."""
    is_half = weight_OI.dtype in (torch.bfloat16, torch.float16)
    is_ready = is_half and weight_OI.is_cuda and weight_OI.is_contiguous() and is_aligned(weight_OI)
    return is_ready and _has_queues(weight_OI.device.index)


@functools.cache
def _has_queues(device_index: int) -> bool:
    return torch.cuda.get_device_capability(device_index) == CAPABILITY
