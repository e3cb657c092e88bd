# pyright: reportMissingImports=false, reportIndexIssue=false
"""Which k logits lead each row on a GPU? One pass over the vocabulary, then a look at k of its blocks.

The leaders lie in the k blocks with the largest maxima: any other block's tokens stand behind k maxima. The
first kernel writes each block's maximum, the second finds the blocks and puts their tokens in order.
Invariant: the total order of `sampling/candidates.py`, (logit descending, id ascending) with -0.0 behind 0.0,
for rows without NaN; a row with NaN has infinity for its largest logit.
R rows, V vocabulary, B blocks, K leaders.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from slipstream.kernels.gpu.nucleus import ordered_key, value_of_key

BLOCK = 64
# Blocks that a program of the first kernel looks at.
BLOCKS = 64
MAX_LEADERS = 128


@triton.jit
def store_block_maxima(x_ptr, maxima_ptr, part, vocab, num_blocks, BLOCKS: tl.constexpr, BLOCK: tl.constexpr):
    """Write the maxima of one part's blocks of a row."""
    b = part * BLOCKS + tl.arange(0, BLOCKS)
    v = b[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    x = tl.load(x_ptr + v, mask=v < vocab, other=float("-inf"))
    x = tl.where(x != x, float("inf"), x)
    key = tl.max(ordered_key(x), 1)
    tl.store(maxima_ptr + b, value_of_key(key), mask=b < num_blocks)


@triton.jit
def _block_maxima(
    x_ptr, maxima_ptr, row_stride, vocab, num_blocks, BLOCKS: tl.constexpr, BLOCK: tl.constexpr
):
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    store_block_maxima(
        x_ptr + row * row_stride, maxima_ptr + row * num_blocks, part, vocab, num_blocks, BLOCKS, BLOCK
    )


@triton.jit
def _place_key(x, place):
    """Return int64 keys in the order of (logit descending, place ascending), all different."""
    return (ordered_key(x).to(tl.int64) << 32) - place.to(tl.int64)


@triton.jit
def _place_of(key):
    return (-key) & 0xFFFFFFFF


@triton.jit
def store_leaders(
    x_ptr, maxima_ptr, values_ptr, ids_ptr, vocab, num_blocks, count, K: tl.constexpr,
    BLOCKS_CEIL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the `count` leaders of a row, at most K and at most its tokens, in order."""
    b = tl.arange(0, BLOCKS_CEIL)
    maxima = tl.load(maxima_ptr + b, mask=b < num_blocks, other=float("-inf"))
    keys = _place_key(maxima, b)
    k = tl.arange(0, K)
    blocks = tl.full((K,), num_blocks, tl.int32)
    for number in range(count):
        best = tl.max(keys, 0)
        blocks = tl.where(k == number, _place_of(best).to(tl.int32), blocks)
        keys = tl.where(keys == best, -0x8000000000000000, keys)
    v = blocks[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    is_token = v < vocab
    x = tl.load(x_ptr + v, mask=is_token, other=float("-inf"))
    x = tl.where(x != x, float("inf"), x)
    # Behind every real token: a row may have nothing but minus infinity.
    tokens = tl.where(is_token, _place_key(x, v), -0x7FFFFFFFFFFFFFFF)
    for number in range(count):
        best = tl.max(tl.max(tokens, 1), 0)
        place = _place_of(best)
        value = value_of_key(((best + place) >> 32).to(tl.int32))
        tl.store(values_ptr + number, value)
        tl.store(ids_ptr + number, place)
        tokens = tl.where(tokens == best, -0x8000000000000000, tokens)


@triton.jit
def _lead(
    x_ptr, maxima_ptr, values_ptr, ids_ptr, row_stride, vocab, num_blocks, K: tl.constexpr,
    BLOCKS_CEIL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    store_leaders(
        x_ptr + row * row_stride, maxima_ptr + row * num_blocks, values_ptr + row * K, ids_ptr + row * K,
        vocab, num_blocks, K, K, BLOCKS_CEIL, BLOCK,
    )  # fmt: skip


def leaders(x_RV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the logits float32 [R, k] and ids int64 [R, k] of the k leading tokens. Only enqueues.

    `x_RV` is float32 with adjacent elements; `can_lead` says which k are served.
    """
    rows, vocab = x_RV.shape
    num_blocks = triton.cdiv(vocab, BLOCK)
    # A kernel is compiled for each number: few of them.
    wanted, k = k, triton.next_power_of_2(k)
    maxima = torch.empty(rows, num_blocks, dtype=torch.float32, device=x_RV.device)
    values = torch.empty(rows, k, dtype=torch.float32, device=x_RV.device)
    ids = torch.empty(rows, k, dtype=torch.int64, device=x_RV.device)
    _block_maxima[(rows, triton.cdiv(num_blocks, BLOCKS))](
        x_RV, maxima, x_RV.stride(0), vocab, num_blocks, BLOCKS=BLOCKS, BLOCK=BLOCK, num_warps=4
    )
    _lead[(rows,)](
        x_RV, maxima, values, ids, x_RV.stride(0), vocab, num_blocks, K=k,
        BLOCKS_CEIL=triton.next_power_of_2(num_blocks), BLOCK=BLOCK, num_warps=8 if k > 16 else 4,
    )  # fmt: skip
    return values[:, :wanted], ids[:, :wanted]


def can_lead(x_RV: Tensor, k: int) -> bool:
    """Say whether `leaders` serves these logits."""
    return k <= MAX_LEADERS and 2 * k * BLOCK <= x_RV.shape[1] and x_RV.stride(1) == 1
