# pyright: reportMissingImports=false, reportIndexIssue=false
"""How does a tile of queries see a tree of drafts on a GPU? From the bits of its tokens, 32 at a time.

Only tiles of keys that hold the span itself ask: what lies before it is seen by all. A tile's product adds
0 x NaN for a key that a query does not see, so values that are not finite leave the product and come back as
NaN to those alone who see them: one branch's overflow spoils no other.
Invariant: as of `kernels/tree_masks.py`; a token without bits is of an ordinary span.
M queries of the tile, N keys.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def count_bits(x):
    """Return how many bits of an int32 are set. Shifts keep the sign, which each mask drops."""
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    x = x + (x >> 8)
    return (x + (x >> 16)) & 0x3F


@triton.jit
def halves(bits):
    """Return the low and the high half of int64 bits as int32."""
    return bits.to(tl.int32), (bits >> 32).to(tl.int32)


@triton.jit
def depth_of(bits):
    """Return how deep each token stands in its tree, -1 for one of an ordinary span."""
    low, high = halves(bits)
    return count_bits(low) + count_bits(high) - 1


@triton.jit
def within_window(bits, depth, window):
    """Return the bits of what a window leaves: the nearest ancestors, which are the highest bits."""
    too_many = depth + 1 - window
    # None where a window is longer than the tree is deep.
    for i in range(0, tl.max(too_many, 0)):
        bits = tl.where(i < too_many, bits & (bits - 1), bits)
    return bits


@triton.jit
def place_queries(bits, position, span_start, window, HAS_WINDOW: tl.constexpr):
    """Return the halves of what each query sees of its span, and where it stands as windows count."""
    depth = depth_of(bits)
    if HAS_WINDOW:
        bits = within_window(bits, depth, window)
    low, high = halves(bits)
    return low, high, tl.where(depth >= 0, span_start + depth, position)


@triton.jit
def sees(low, high, q_position, span_start, position, last):
    """Return [M, N]: which keys each query sees, behind the span's start only those of its bits."""
    offset = position - span_start
    word = tl.where((offset >= 32)[None, :], high[:, None], low[:, None])
    is_ancestor = ((word >> (offset & 31)[None, :]) & 1) != 0
    in_tree = (offset < 0)[None, :] | (is_ancestor & (position < last)[None, :])
    is_tree = ((low | high) != 0)[:, None]
    return (is_tree & in_tree) | ((is_tree == 0) & (position[None, :] <= q_position[:, None]))


@triton.jit
def keep_apart(scores, weights, v):
    """Return weights and values whose product spoils no query by what it does not see."""
    is_bad = tl.max((tl.abs(v.to(tl.float32)) <= 3.4028234e38).to(tl.int32) ^ 1, 1) != 0
    weights = tl.where(is_bad[None, :] & (scores > float("-inf")), float("nan"), weights)
    return weights, tl.where(is_bad[:, None], 0.0, v).to(v.dtype)
