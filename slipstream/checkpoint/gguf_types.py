"""How are the numbers of a GGUF tensor stored, and how do they become floats?

Each quantised type packs a fixed number of elements into a block of bytes: scales (float16), sometimes
minima, and small integers split over low and high bits. Decoding runs a few vectorised passes over tiles that
stay in the CPU's cache, in float32 and in the order (scale * q) + minimum, each step rounded.

Sources: the block structures of ggml (`ggml-common.h`) as named in the GGUF specification's type list; OCP
Microscaling Formats, version 1.0 (MXFP4).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import torch

from slipstream.checkpoint.weight_file import view_bytes

# Elements decoded per pass: 512 kB of float32, which stay in the second-level cache between the passes.
_TILE_ELEMENTS = 2**17

Unpack = Callable[[np.ndarray, np.ndarray], None]


@dataclasses.dataclass(frozen=True, slots=True)
class BlockType:
    """`elements` numbers stored in `num_bytes` bytes.

    Plain types have the torch `dtype` they are viewed as. Quantised ones have `unpack(blocks, out)`: uint8
    [n, num_bytes] to float32 [n, elements], written into `out`.
    """

    name: str
    elements: int
    num_bytes: int
    dtype: torch.dtype | None = None
    unpack: Unpack | None = None


def decode(block: BlockType, raw: np.ndarray) -> torch.Tensor:
    """Turn whole blocks (uint8, 1-D) into a 1-D tensor: the stored type for plain types, else float32.

    Plain types alias `raw`.
    """
    if block.dtype is not None:
        return view_bytes(raw, block.dtype)
    assert block.unpack is not None, f"{block.name} has neither dtype nor unpack"
    blocks = raw.reshape(-1, block.num_bytes)
    out = np.empty((len(blocks), block.elements), dtype=np.float32)
    tile = max(1, _TILE_ELEMENTS // block.elements)
    # Damaged scales may be infinite or NaN; who loads the weights decides about that, not a warning here.
    with np.errstate(invalid="ignore", over="ignore"):
        for start in range(0, len(blocks), tile):
            block.unpack(blocks[start : start + tile], out[start : start + tile])
    return torch.from_numpy(out.reshape(-1))


def _half(blocks: np.ndarray, at: int) -> np.ndarray:
    """Return the float16 at byte `at` of every block as float32 [n, 1]."""
    return blocks[:, at : at + 2].copy().view("<f2").astype(np.float32)


def _unpack_q8_0(blocks: np.ndarray, out: np.ndarray) -> None:
    out[:] = blocks[:, 2:].view(np.int8)
    out *= _half(blocks, 0)


def _unpack_q4_0(blocks: np.ndarray, out: np.ndarray) -> None:
    out[:, :16] = ((blocks & 15).view(np.int8) - np.int8(8))[:, 2:]
    out[:, 16:] = ((blocks >> 4).view(np.int8) - np.int8(8))[:, 2:]
    out *= _half(blocks, 0)


def _unpack_q4_1(blocks: np.ndarray, out: np.ndarray) -> None:
    # Masking whole blocks, scales included, is one long pass; masking a slice is a short one for each block.
    out[:, :16] = (blocks & 15)[:, 4:]
    out[:, 16:] = (blocks >> 4)[:, 4:]
    out *= _half(blocks, 0)
    out += _half(blocks, 2)


def _five_bits(blocks: np.ndarray, at: int) -> np.ndarray:
    """Return uint8 [n, 32] of 0..31: bit 4 from the 32-bit word at `at`, the rest from the 16 bytes after."""
    q = np.unpackbits(blocks[:, at : at + 4], axis=1, bitorder="little")
    q <<= 4
    packed = blocks[:, at + 4 :]
    q[:, :16] |= packed & 15
    q[:, 16:] |= packed >> 4
    return q


def _unpack_q5_0(blocks: np.ndarray, out: np.ndarray) -> None:
    out[:] = _five_bits(blocks, 2).view(np.int8) - np.int8(16)
    out *= _half(blocks, 0)


def _unpack_q5_1(blocks: np.ndarray, out: np.ndarray) -> None:
    out[:] = _five_bits(blocks, 4)
    out *= _half(blocks, 0)
    out += _half(blocks, 2)


def _six_bit_scales(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (scale, minimum) of the 8 groups of a Q4_K or Q5_K block, float32 [n, 8, 1].

    Bytes 4..15 hold 8 scales and 8 minima of 6 bits: the first four of each whole in the low bits of bytes
    0..3 and 4..7; the last four with their low nibbles in bytes 8..11 and their top bits in bytes 0..7.
    """
    scale_bytes, min_bytes, nibbles = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = np.concatenate([scale_bytes & 63, (nibbles & 15) | (scale_bytes >> 6 << 4)], axis=1)
    minima = np.concatenate([min_bytes & 63, (nibbles >> 4) | (min_bytes >> 6 << 4)], axis=1)
    return (_half(blocks, 0) * scales)[:, :, None], (_half(blocks, 2) * minima)[:, :, None]


def _unpack_q4_k(blocks: np.ndarray, out: np.ndarray) -> None:
    packed = blocks[:, 16:].reshape(-1, 4, 32)
    pairs = out.reshape(-1, 4, 2, 32)
    pairs[:, :, 0] = packed & 15
    pairs[:, :, 1] = packed >> 4
    scales, minima = _six_bit_scales(blocks)
    groups = out.reshape(-1, 8, 32)
    groups *= scales
    groups -= minima


def _unpack_q5_k(blocks: np.ndarray, out: np.ndarray) -> None:
    high, packed = blocks[:, 16:48], blocks[:, 48:].reshape(-1, 4, 32)
    groups = out.reshape(-1, 8, 32)
    for group in range(8):
        nibble = packed[:, group // 2] & 15 if group % 2 == 0 else packed[:, group // 2] >> 4
        groups[:, group] = nibble | ((high >> group & 1) << 4)
    scales, minima = _six_bit_scales(blocks)
    groups *= scales
    groups -= minima


def _unpack_q6_k(blocks: np.ndarray, out: np.ndarray) -> None:
    low = blocks[:, :128].reshape(-1, 2, 2, 32)
    high = blocks[:, 128:192].reshape(-1, 2, 32)
    quarters = out.reshape(-1, 2, 4, 32)
    for quarter in range(4):
        packed = low[:, :, quarter % 2]
        q = (packed & 15 if quarter < 2 else packed >> 4) | ((high >> 2 * quarter & 3) << 4)
        quarters[:, :, quarter] = q.view(np.int8) - np.int8(32)
    scales = _half(blocks, 208) * blocks[:, 192:208].view(np.int8)
    groups = out.reshape(-1, 16, 16)
    groups *= scales[:, :, None]


def _unpack_q2_k(blocks: np.ndarray, out: np.ndarray) -> None:
    packed = blocks[:, 16:80].reshape(-1, 2, 32)
    quarters = out.reshape(-1, 2, 4, 32)
    for quarter in range(4):
        quarters[:, :, quarter] = packed >> 2 * quarter & 3
    groups = out.reshape(-1, 16, 16)
    groups *= (_half(blocks, 80) * (blocks[:, :16] & 15))[:, :, None]
    groups -= (_half(blocks, 82) * (blocks[:, :16] >> 4))[:, :, None]


def _unpack_q3_k(blocks: np.ndarray, out: np.ndarray) -> None:
    # An element is its two low bits, less 4 where its bit of the mask is clear.
    mask, packed = blocks[:, :32], blocks[:, 32:96].reshape(-1, 2, 32)
    eighths = out.reshape(-1, 8, 32)
    for eighth in range(8):
        low = packed[:, eighth // 4] >> 2 * (eighth % 4) & 3
        eighths[:, eighth] = (low | (mask >> eighth & 1) << 2).view(np.int8) - np.int8(4)
    # 16 scales of 6 bits: nibbles in bytes 96..103, their two top bits by fours in bytes 104..107.
    nibbles, tops = blocks[:, 96:104], blocks[:, 104:108]
    low = np.concatenate([nibbles & 15, nibbles >> 4], axis=1)
    high = np.concatenate([tops >> shift & 3 for shift in (0, 2, 4, 6)], axis=1)
    scales = _half(blocks, 108) * ((low | high << 4).view(np.int8) - np.int8(32))
    groups = out.reshape(-1, 16, 16)
    groups *= scales[:, :, None]


# The 16 values of a non-linear nibble, and the doubled values of a 4-bit float (E2M1).
_NON_LINEAR = np.array(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], dtype=np.float32
)
_E2M1_TWICE = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], dtype=np.float32)


def _look_up(table: np.ndarray, packed: np.ndarray, out: np.ndarray) -> None:
    """Write `table` at the low nibbles of `packed` [..., 16], then at the high ones, to out [..., 32]."""
    out[..., :16] = table[packed & 15]
    out[..., 16:] = table[packed >> 4]


def _unpack_iq4_nl(blocks: np.ndarray, out: np.ndarray) -> None:
    _look_up(_NON_LINEAR, blocks[:, 2:], out)
    out *= _half(blocks, 0)


def _unpack_iq4_xs(blocks: np.ndarray, out: np.ndarray) -> None:
    groups = out.reshape(-1, 8, 32)
    _look_up(_NON_LINEAR, blocks[:, 8:].reshape(-1, 8, 16), groups)
    # 8 scales of 6 bits: nibbles in bytes 4..7, top bits two by two in bytes 2..3, both low bits first.
    eighth = np.arange(8, dtype=np.uint8)
    low = blocks[:, 4 + eighth // 2] >> 4 * (eighth % 2) & 15
    high = blocks[:, 2 + eighth // 4] >> 2 * (eighth % 4) & 3
    groups *= (_half(blocks, 0) * ((low | high << 4).view(np.int8) - np.int8(32)))[:, :, None]


def _unpack_mxfp4(blocks: np.ndarray, out: np.ndarray) -> None:
    _look_up(_E2M1_TWICE, blocks[:, 1:], out)
    # Half of 2^(e - 127), since the table is doubled; the two smallest are subnormal.
    out *= np.ldexp(np.float32(1.0), blocks[:, :1].astype(np.int32) - 128)


# By the number that a GGUF file stores.
BLOCK_TYPES: dict[int, BlockType] = {
    0: BlockType("F32", 1, 4, dtype=torch.float32),
    1: BlockType("F16", 1, 2, dtype=torch.float16),
    2: BlockType("Q4_0", 32, 18, unpack=_unpack_q4_0),
    3: BlockType("Q4_1", 32, 20, unpack=_unpack_q4_1),
    6: BlockType("Q5_0", 32, 22, unpack=_unpack_q5_0),
    7: BlockType("Q5_1", 32, 24, unpack=_unpack_q5_1),
    8: BlockType("Q8_0", 32, 34, unpack=_unpack_q8_0),
    10: BlockType("Q2_K", 256, 84, unpack=_unpack_q2_k),
    11: BlockType("Q3_K", 256, 110, unpack=_unpack_q3_k),
    12: BlockType("Q4_K", 256, 144, unpack=_unpack_q4_k),
    13: BlockType("Q5_K", 256, 176, unpack=_unpack_q5_k),
    14: BlockType("Q6_K", 256, 210, unpack=_unpack_q6_k),
    20: BlockType("IQ4_NL", 32, 18, unpack=_unpack_iq4_nl),
    23: BlockType("IQ4_XS", 256, 136, unpack=_unpack_iq4_xs),
    30: BlockType("BF16", 1, 2, dtype=torch.bfloat16),
    39: BlockType("MXFP4", 32, 17, unpack=_unpack_mxfp4),
}

# Types that exist and are not read yet, so that the message can name them.
UNREAD_TYPES: dict[int, str] = {
    **{9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 21: "IQ3_S"},
    **{22: "IQ2_S", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0"},
    **{35: "TQ2_0", 40: "NVFP4", 41: "Q1_0"},
}
