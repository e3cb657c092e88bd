# pyright: reportMissingImports=false, reportIndexIssue=false
"""How is a product of 2 to 256 tokens cut, and is it ours or the vendor's library's? A table and a rule.

The table is what won on an NVIDIA H100 80GB HBM3 (torch 2.11.0, triton 3.6.0): within a block
(`benchmarks/tune_block.py`), the head and 32 tokens alone (`benchmarks/tune_matmul.py`), against cuBLAS
together with the small kernels that ours make unnecessary. The rule follows its pattern: a few tokens meet
deep queues of small blocks, and from 128 on the library does well.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from slipstream.kernels.gpu.matmul import Tile

MAX_TOKENS = 256
# The sizes of the table; a step takes the next larger one.
SIZES = (16, 32, 64, 128, 256)

# By (outputs, inputs, is gated, tokens) of 16-bit weights; None: the library. In microseconds a block takes
# 170 (16 tokens), 189 (64), 221 (128), 287 (256), with attention over 192; with cuBLAS 184, 202, 233 and 298.
TILES: dict[tuple[int, int, bool, int], Tile | None] = {
    (6144, 4096, False, 16): Tile(16, 64, 256, 3, 4, ahead=2),
    (6144, 4096, False, 32): Tile(32, 64, 128, 5, 4, ahead=2),
    (6144, 4096, False, 64): Tile(64, 64, 128, 5, 4, ahead=2),
    (6144, 4096, False, 128): Tile(128, 64, 64, 6, 4, ahead=8),
    (6144, 4096, False, 256): None,
    (4096, 4096, False, 16): Tile(16, 64, 256, 5, 4, ahead=8),
    (4096, 4096, False, 32): Tile(32, 64, 256, 4, 4),
    (4096, 4096, False, 64): Tile(64, 32, 128, 8, 4, weights_first=False, ahead=2),
    (4096, 4096, False, 128): None,
    (4096, 4096, False, 256): None,
    (28672, 4096, True, 16): Tile(16, 64, 256, 3, 4, ahead=2),
    (28672, 4096, True, 32): Tile(32, 64, 128, 4, 4, ahead=2),
    (28672, 4096, True, 64): Tile(64, 64, 128, 4, 4),
    (28672, 4096, True, 128): Tile(128, 64, 64, 3, 4, ahead=2),
    (28672, 4096, True, 256): Tile(256, 64, 64, 4, 8, ahead=2),
    (4096, 14336, False, 16): Tile(16, 64, 128, 6, 4, shares=2, ahead=2),
    (4096, 14336, False, 32): Tile(32, 64, 128, 9, 4, ahead=8),
    (4096, 14336, False, 64): Tile(64, 32, 128, 8, 4, weights_first=False, ahead=2),
    (4096, 14336, False, 128): Tile(128, 64, 64, 9, 4, shares=2, ahead=8),
    (4096, 14336, False, 256): None,
    (128256, 4096, False, 16): Tile(16, 64, 128, 6, 4, ahead=2),
    (128256, 4096, False, 32): Tile(32, 64, 128, 6, 4, ahead=2),
    (128256, 4096, False, 64): Tile(64, 128, 64, 5, 8, ahead=2),
    (128256, 4096, False, 128): Tile(128, 128, 64, 6, 8, ahead=8),
    (128256, 4096, False, 256): None,
}
RULE = {
    16: Tile(16, 64, 128, 6, 4, ahead=2),
    32: Tile(32, 64, 128, 5, 4, ahead=2),
    64: Tile(64, 64, 128, 4, 4, ahead=2),
    128: Tile(128, 64, 64, 6, 4, ahead=2),
    256: Tile(256, 64, 64, 4, 8, ahead=2),
}
# Up to which size the rule holds where nothing was measured.
LAST_RULED = 64
# A block of fewer outputs than this leaves most multiprocessors without work.
MIN_OUTPUTS = 2048
CAPABILITY = (9, 0)


def tile_of(
    x_TI: Tensor, weight_OI: Tensor, *, is_gated: bool, has_counters: bool = False, must_serve: bool = False
) -> Tile | None:
    """Return the tile for a product, or None where the library computes it.

    Ours need 16-bit elements, lines that start at multiples of 16 bytes, and the tensor memory accelerator of
    compute capability 9.0. With `must_serve` the answer is a tile, for what only our kernel can take.
    """
    tokens = len(x_TI)
    if tokens < 2 or tokens > MAX_TOKENS or not _can_run(x_TI, weight_OI):
        assert not must_serve, "only our kernel makes what only it can take"
        return None
    outputs, inputs = weight_OI.shape
    size = next(size for size in SIZES if tokens <= size)
    rule = RULE[size] if size <= LAST_RULED and outputs >= MIN_OUTPUTS else None
    tile = TILES.get((outputs, inputs, is_gated, size), rule)
    if tile is not None and tile.shares > 1 and not has_counters:
        tile = None
    return RULE[size] if tile is None and must_serve else tile


def _can_run(x_TI: Tensor, weight_OI: Tensor) -> bool:
    is_half = x_TI.dtype in (torch.bfloat16, torch.float16) and weight_OI.dtype == x_TI.dtype
    if not is_half or x_TI.stride(-1) != 1 or weight_OI.stride(-1) != 1:
        return False
    strides = (x_TI.stride(0), weight_OI.stride(0), x_TI.storage_offset(), weight_OI.storage_offset())
    return all(stride % 8 == 0 for stride in strides) and _has_room(x_TI.device.index)


@functools.cache
def _has_room(device_index: int) -> bool:
    """Say whether a GPU is of the kind that the tiles were made for: others have less memory for a queue."""
    return torch.cuda.get_device_capability(device_index) == CAPABILITY
