# pyright: reportMissingImports=false, reportIndexIssue=false
"""Which token does a random row draw from its nucleus on a GPU, exactly and without sorting the vocabulary?

Tokens stand in the order of (logit descending, id ascending), each with an integer mass. Both where the
nucleus ends and which token is drawn are questions of one kind: at which logit does the mass of all greater
ones pass a bound? A program answers them for a row by narrowing an interval of logits, eight parts at a time,
in a few passes over the row. Equal logits have equal masses, so among them a division finds the place.
Invariant: the token that ordering, cumulative sums and searches of `sampling/filters.py` find, bit by bit:
masses are floor(2^bits exp((x - max) / T)), by the exponential and the division that torch uses.
N rows, V vocabulary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

# Tokens at once, and warps: 2.1 ms for 256 rows of 128,256 on an H100, where sorting took 10.
BLOCK = 1024
WARPS = 16


@triton.jit
def _key(x):
    """Return int32 in the order of float32 values; -0.0 stands behind 0.0."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _value(key):
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _mass(x, largest, temperature, scale):
    """Return the integer masses of logits."""
    return (libdevice.exp(tl.div_rn(x - largest, temperature)) * scale).to(tl.int64)


@triton.jit
def _is_below(mass, bound, target, IS_BOUND: tl.constexpr):
    """Say whether a mass before a token leaves it inside: below a float64 bound, or not above a target."""
    if IS_BOUND:
        return mass.to(tl.float64) < bound
    else:
        return mass <= target


@triton.jit
def _border(low, high, part, by_value):
    """Return the key after `part` eighths of an interval; the highest is never one."""
    # In 64 bits, for the span of keys may not fit 32.
    by_key = (low + (high.to(tl.int64) - low.to(tl.int64)) * part // 8).to(tl.int32)
    first = _value(low)
    border = tl.where(by_value, _key(first + (_value(high) - first) * (part / 8)), by_key)
    return tl.maximum(tl.minimum(border, high - 1), low)


@triton.jit
def _find(
    x_ptr, vocab, largest, temperature, scale, low, high, bound, target, IS_BOUND: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Return the smallest key whose greater ones have a mass that is below, that mass, and its count."""
    v = tl.arange(0, BLOCK)
    # The mass of keys above `high`.
    above = tl.full((), 0, tl.int64)
    count = tl.full((), 0, tl.int32)
    is_open, is_even = True, True
    while is_open:
        # Seven borders between eight parts: of the values, and every other time of the keys, which ends.
        b1, b2 = _border(low, high, 1, is_even), _border(low, high, 2, is_even)
        b3, b4 = _border(low, high, 3, is_even), _border(low, high, 4, is_even)
        b5, b6 = _border(low, high, 5, is_even), _border(low, high, 6, is_even)
        b7 = _border(low, high, 7, is_even)
        is_even = not is_even
        zero = tl.zeros((BLOCK,), tl.int64)
        s1, s2, s3, s4, s5, s6, s7 = zero, zero, zero, zero, zero, zero, zero
        counts = tl.zeros((BLOCK,), tl.int32)
        least = tl.full((BLOCK,), 0x7FFFFFFF, tl.int32)
        most = tl.full((BLOCK,), -0x80000000, tl.int32)
        for at in range(0, vocab, BLOCK):
            x = tl.load(x_ptr + at + v, mask=at + v < vocab, other=float("-inf"))
            key = _key(x)
            inside = (key >= low) & (key <= high) & (at + v < vocab)
            mass = tl.where(inside, _mass(x, largest, temperature, scale), 0)
            s1 += tl.where(key > b1, mass, 0)
            s2 += tl.where(key > b2, mass, 0)
            s3 += tl.where(key > b3, mass, 0)
            s4 += tl.where(key > b4, mass, 0)
            s5 += tl.where(key > b5, mass, 0)
            s6 += tl.where(key > b6, mass, 0)
            s7 += tl.where(key > b7, mass, 0)
            counts += inside.to(tl.int32)
            least = tl.minimum(least, tl.where(inside, key, 0x7FFFFFFF))
            most = tl.maximum(most, tl.where(inside, key, -0x80000000))
        lowest, highest = tl.min(least, 0), tl.max(most, 0)
        base, new_low, new_high = above, lowest, highest
        # From the lowest border up: the first with a mass below it is the last that may be the answer.
        m1, m2, m3 = base + tl.sum(s1, 0), base + tl.sum(s2, 0), base + tl.sum(s3, 0)
        m4, m5, m6 = base + tl.sum(s4, 0), base + tl.sum(s5, 0), base + tl.sum(s6, 0)
        m7 = base + tl.sum(s7, 0)
        if lowest == highest:
            count = tl.sum(counts, 0)
            is_open = False
        elif _is_below(m1, bound, target, IS_BOUND):
            new_high, above = b1, m1
        elif _is_below(m2, bound, target, IS_BOUND):
            new_low, new_high, above = b1 + 1, b2, m2
        elif _is_below(m3, bound, target, IS_BOUND):
            new_low, new_high, above = b2 + 1, b3, m3
        elif _is_below(m4, bound, target, IS_BOUND):
            new_low, new_high, above = b3 + 1, b4, m4
        elif _is_below(m5, bound, target, IS_BOUND):
            new_low, new_high, above = b4 + 1, b5, m5
        elif _is_below(m6, bound, target, IS_BOUND):
            new_low, new_high, above = b5 + 1, b6, m6
        elif _is_below(m7, bound, target, IS_BOUND):
            new_low, new_high, above = b6 + 1, b7, m7
        else:
            new_low = b7 + 1
        low, high = tl.maximum(new_low, lowest), tl.minimum(new_high, highest)
    return low, above, count


@triton.jit
def _draw_nucleus(
    x_ptr, max_ptr, temperature_ptr, top_p_ptr, min_mass_ptr, uniform_ptr, out_ptr, row_stride, vocab, scale,
    BITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * row_stride
    largest, temperature = tl.load(max_ptr + row), tl.load(temperature_ptr + row)
    min_mass = tl.load(min_mass_ptr + row)
    v = tl.arange(0, BLOCK)
    totals, larger_ones = tl.zeros((BLOCK,), tl.int64), tl.zeros((BLOCK,), tl.int64)
    least = tl.full((BLOCK,), float("inf"), tl.float32)
    for at in range(0, vocab, BLOCK):
        x = tl.load(x_ptr + at + v, mask=at + v < vocab, other=float("-inf"))
        mass = _mass(x, largest, temperature, scale)
        totals += mass
        larger_ones += tl.where(mass >= min_mass, mass, 0)
        least = tl.minimum(least, tl.where(at + v < vocab, x, float("inf")))
    total = tl.sum(totals, 0)
    # A row of NaN or without a finite maximum is the caller's to refuse.
    token = tl.full((), 0, tl.int64)
    if (total > 0) & (largest < float("inf")) & (largest > float("-inf")):
        bound = tl.load(top_p_ptr + row) * total.to(tl.float64)
        # Below this nothing has a mass.
        high = _key(largest)
        low = tl.maximum(_key(largest - temperature * BITS), _key(tl.min(least, 0)))
        low = tl.minimum(low, high)
        end, before, count = _find(
            x_ptr, vocab, largest, temperature, scale, low, high, bound, total, True, BLOCK
        )
        own = _mass(_value(end), largest, temperature, scale)
        # How many of the tokens at the end are inside: the first always, others while the bound holds.
        inside, outside = tl.full((), 1, tl.int32), count + 1
        while outside - inside > 1:
            middle = (inside + outside) // 2
            if (before + (middle - 1).to(tl.int64) * own).to(tl.float64) < bound:
                inside = middle
            else:
                outside = middle
        kept = before + inside.to(tl.int64) * own
        if own < min_mass:
            kept = tl.minimum(before, tl.sum(larger_ones, 0))
        target = (tl.load(uniform_ptr + row) * kept.to(tl.float64)).to(tl.int64)
        target = tl.minimum(target, kept - 1)
        drawn, before, count = _find(
            x_ptr, vocab, largest, temperature, scale, end, high, bound, target, False, BLOCK
        )
        own = tl.maximum(_mass(_value(drawn), largest, temperature, scale), 1)
        place = ((target - before) // own).to(tl.int32)
        # The token with that many equals of a lower id.
        seen = tl.full((), 0, tl.int32)
        at = 0
        while (at < vocab) & (seen <= place):
            x = tl.load(x_ptr + at + v, mask=at + v < vocab, other=float("-inf"))
            is_equal = ((_key(x) == drawn) & (at + v < vocab)).to(tl.int32)
            number = tl.sum(is_equal, 0)
            if seen + number > place:
                rank = seen + tl.cumsum(is_equal, 0) - 1
                found = (is_equal > 0) & (rank == place)
                token = at + tl.max(tl.where(found, v, 0), 0).to(tl.int64)
            seen += number
            at += BLOCK
    tl.store(out_ptr + row, token)


@triton.jit
def _row_mass(
    x_ptr, max_ptr, chosen_ptr, total_ptr, rank_ptr, row_stride, vocab, scale, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * row_stride
    largest, chosen = tl.load(max_ptr + row), tl.load(chosen_ptr + row)
    v = tl.arange(0, BLOCK)
    totals, greater = tl.zeros((BLOCK,), tl.int64), tl.zeros((BLOCK,), tl.int32)
    for at in range(0, vocab, BLOCK):
        x = tl.load(x_ptr + at + v, mask=at + v < vocab, other=float("-inf"))
        totals += (libdevice.exp(x - largest) * scale).to(tl.int64)
        greater += (x > chosen).to(tl.int32)
    tl.store(total_ptr + row, tl.sum(totals, 0))
    tl.store(rank_ptr + row, (tl.sum(greater, 0) + 1).to(tl.int64))


def draw_nucleus(
    x_NV: Tensor,
    max_N: Tensor,
    temperature_N: Tensor,
    top_p_N: Tensor,
    min_mass_N: Tensor,
    uniform_N: Tensor,
    *,
    bits: int,
) -> Tensor:
    """Return one token id per row, int64 [N], of float32 logits with adjacent elements. Only enqueues.

    `max_N` is each row's largest logit; temperature is float32, top-p and the noise float64, the least mass
    that min-p allows int64.
    """
    rows, vocab = x_NV.shape
    out_N = torch.empty(rows, dtype=torch.int64, device=x_NV.device)
    _draw_nucleus[(rows,)](
        x_NV, max_N, temperature_N, top_p_N, min_mass_N, uniform_N, out_N, x_NV.stride(0), vocab, 2.0**bits,
        BITS=bits, BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip
    return out_N


def row_mass(x_RV: Tensor, max_R: Tensor, chosen_R: Tensor, *, bits: int) -> tuple[Tensor, Tensor]:
    """Return the mass of each row at temperature 1, and 1 + how many logits exceed `chosen_R`; int64 [R]."""
    rows, vocab = x_RV.shape
    total_R, rank_R = (torch.empty(rows, dtype=torch.int64, device=x_RV.device) for _ in range(2))
    _row_mass[(rows,)](
        x_RV, max_R, chosen_R, total_R, rank_R, x_RV.stride(0), vocab, 2.0**bits, BLOCK=BLOCK, num_warps=WARPS
    )
    return total_R, rank_R
