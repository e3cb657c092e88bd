"""Every block type decodes as the `gguf` package does: same operations, same rounding, so no tolerance."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from slipstream.checkpoint.gguf_types import _TILE_ELEMENTS, BLOCK_TYPES, UNREAD_TYPES, decode

QUANTISED = sorted(kind for kind, block in BLOCK_TYPES.items() if block.unpack is not None)


def random_blocks(kind: int, count: int, *, seed: int) -> np.ndarray:
    """Random bytes: every integer, and scales over all of float16, infinities and NaN included."""
    return np.random.default_rng(seed).integers(0, 256, (count, BLOCK_TYPES[kind].num_bytes), dtype=np.uint8)


def by_oracle(kind: int, blocks: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        return gguf.dequantize(blocks, gguf.GGMLQuantizationType(kind)).reshape(-1)


@pytest.mark.parametrize("kind", QUANTISED, ids=lambda kind: BLOCK_TYPES[kind].name)
def test_random_blocks_decode_as_the_oracle_does(kind: int) -> None:
    blocks = random_blocks(kind, 1000, seed=kind)
    decoded = decode(BLOCK_TYPES[kind], blocks.reshape(-1))
    assert decoded.dtype == torch.float32
    # assert_array_equal holds NaN equal to NaN; most of the values are finite.
    np.testing.assert_array_equal(decoded.numpy(), by_oracle(kind, blocks))
    assert np.isfinite(decoded.numpy()).mean() > 0.8


@pytest.mark.parametrize("kind", QUANTISED, ids=lambda kind: BLOCK_TYPES[kind].name)
def test_tiles_do_not_show(kind: int) -> None:
    block = BLOCK_TYPES[kind]
    blocks = random_blocks(kind, 2 * _TILE_ELEMENTS // block.elements + 3, seed=kind + 100)
    np.testing.assert_array_equal(decode(block, blocks.reshape(-1)).numpy(), by_oracle(kind, blocks))


@pytest.mark.parametrize("kind", [0, 1, 30], ids=lambda kind: BLOCK_TYPES[kind].name)
def test_plain_types_keep_their_bits(kind: int) -> None:
    block = BLOCK_TYPES[kind]
    raw = random_blocks(kind, 1000, seed=kind).reshape(-1)
    decoded = decode(block, raw)
    assert decoded.dtype == block.dtype and decoded.view(torch.uint8).numpy().tobytes() == raw.tobytes()
    np.testing.assert_array_equal(decoded.float().numpy(), by_oracle(kind, raw))


def test_names_and_sizes_are_those_of_the_format() -> None:
    for kind, block in BLOCK_TYPES.items():
        known = gguf.GGMLQuantizationType(kind)
        assert block.name == known.name
        assert (block.elements, block.num_bytes) == gguf.GGML_QUANT_SIZES[known]
    ours = {kind: block.name for kind, block in BLOCK_TYPES.items()} | UNREAD_TYPES
    assert len(ours) == len(BLOCK_TYPES) + len(UNREAD_TYPES)
    assert {known.name for known in gguf.GGMLQuantizationType} <= set(ours.values())


def test_no_blocks_decode_to_no_numbers() -> None:
    for block in BLOCK_TYPES.values():
        assert decode(block, np.empty(0, dtype=np.uint8)).shape == (0,)
