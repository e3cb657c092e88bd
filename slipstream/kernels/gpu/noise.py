# pyright: reportMissingImports=false, reportIndexIssue=false
"""Which random number does each row of a batch draw at its position, in one kernel?

The definition, with its source, is `sampling/philox.py`: Philox4x32-10 with 32-bit words in int64, whose
product wraps to the low 64 bits. N random rows; the tables have one line per row of the engine.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 128
ROUNDS = 10


@triton.jit
def _high_and_low(word, MULTIPLIER: tl.constexpr):
    """Return both words of a product of two words."""
    product = word * tl.full((), MULTIPLIER, tl.int64)
    mask = tl.full((), 0xFFFFFFFF, tl.int64)
    return (product >> 32) & mask, product & mask


@triton.jit
def uniform_of(key0, key1, sample_idx, position, ROUNDS: tl.constexpr):
    """Return float64 in [0, 1) of int64 numbers or blocks of them."""
    mask = tl.full((), 0xFFFFFFFF, tl.int64)
    word0, word1 = position & mask, sample_idx
    word2 = word0 ^ word0
    word3 = word2
    for _ in range(ROUNDS):
        high0, low0 = _high_and_low(word0, 0xD2511F53)
        high1, low1 = _high_and_low(word2, 0xCD9E8D57)
        word0, word1 = high1 ^ word1 ^ key0, low1
        word2, word3 = high0 ^ word3 ^ key1, low0
        key0 = (key0 + tl.full((), 0x9E3779B9, tl.int64)) & mask
        key1 = (key1 + tl.full((), 0xBB67AE85, tl.int64)) & mask
    bits = (word0 >> 5) * 67108864 + (word1 >> 6)
    # 2 to the power of -53, which float32 holds exactly.
    return bits.to(tl.float64) * 1.1102230246251565e-16


@triton.jit(
    do_not_specialize=["num_rows"],
    do_not_specialize_on_alignment=["rows_ptr", "position_ptr"],
)
def _uniform(
    rows_ptr, ints_ptr, position_ptr, out_ptr, num_rows, ints_stride, KEY: tl.constexpr,
    SAMPLE_IDX: tl.constexpr, ROUNDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_row = n < num_rows
    row = tl.load(rows_ptr + n, mask=is_row, other=0)
    ints = ints_ptr + row * ints_stride
    key0, key1 = tl.load(ints + KEY, mask=is_row, other=0), tl.load(ints + KEY + 1, mask=is_row, other=0)
    position = tl.load(position_ptr + row, mask=is_row, other=0)
    sample_idx = tl.load(ints + SAMPLE_IDX, mask=is_row, other=0)
    tl.store(out_ptr + n, uniform_of(key0, key1, sample_idx, position, ROUNDS), mask=is_row)


def uniform(rows_N: Tensor, ints: Tensor, position: Tensor, *, key_column: int, sample_column: int) -> Tensor:
    """Return float64 [N] in [0, 1) for rows of the engine. Only enqueues.

    `ints` int64 [rows, columns] holds the key's two words and the sample index in the given columns,
    `position` int64 [rows] the number of tokens generated.
    """
    out_N = torch.empty(len(rows_N), dtype=torch.float64, device=rows_N.device)
    _uniform[(triton.cdiv(len(rows_N), BLOCK),)](
        rows_N, ints, position, out_N, len(rows_N), ints.stride(0), KEY=key_column, SAMPLE_IDX=sample_column,
        ROUNDS=ROUNDS, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    return out_N
