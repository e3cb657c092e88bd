# pyright: reportMissingImports=false, reportIndexIssue=false
"""Which token does a random row draw from its nucleus on a GPU, exactly and without sorting the vocabulary?

Tokens stand in the order of (logit descending, id ascending), each with an integer mass. Both where the
nucleus ends and which token is drawn are questions of one kind: at which logit does the mass of all greater
ones pass a bound? A program answers both for its row in three to four passes: passes in float32 say between
which logits the answers lie, at eight borders at once, until few tokens are left there; a pass over the exact
integers sums what stands above and lists those few with their ids; among them the answers are found exactly.
Equal logits have equal masses, so among them a division finds the place.
Invariant: the token that ordering, cumulative sums and searches of `sampling/filters.py` find, bit by bit:
masses are floor(2^bits exp((x - max) / T)), by the exponential and the division that torch uses. Estimates
only choose where to look: an answer from the list is checked against exact sums, and where it is not certain
(a nucleus that leaves out less than float32 can tell, or more equal tokens than a list holds) the whole row
is searched. N rows, V vocabulary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

# Lines of tokens at once, their width, and warps: two programs share a multiprocessor.
LINES, WIDTH = 4, 1024
WARPS = 8
MAX_REGISTERS = 128
# Tokens at once among those of a list; and how many a list holds.
BLOCK = 1024
CAPACITY = 8192
# Passes of estimates at most; each leaves about a twentieth of what was left.
MAX_ESTIMATES = 4
# What estimated masses may be off by, as a share of the total: sums of 2^17 float32 terms by 2^10 lanes.
SLACK = 2e-5
# As in `sampling/base.py`.
OK, BAD_LOGITS, ALL_MASKED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def ordered_key(x):
    """Return int32 in the order of float32 values; -0.0 stands behind 0.0."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def value_of_key(key):
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def integer_mass(x, largest, temperature, scale):
    """Return the integer masses of logits.

    The quotient is that of a division, at the cost of three products: with a reciprocal rounded to the
    nearest, a quotient corrected by its exact remainder is rounded so too (Markstein, "Computation
    of elementary functions on the IBM RISC System/6000 processor", IBM J. Res. Dev. 34(1), 1990). Far below
    the largest there is nothing to correct: the mass is 0.
    """
    distance = x - largest
    reciprocal = tl.div_rn(tl.full((), 1.0, tl.float32), temperature)
    quotient = distance * reciprocal
    remainder = libdevice.fma_rn(-quotient, temperature, distance)
    corrected = libdevice.fma_rn(remainder, reciprocal, quotient)
    quotient = tl.where(quotient > -1e3, corrected, quotient)
    return (libdevice.exp(quotient) * scale).to(tl.int64)


@triton.jit
def status_of(largest):
    """Return int32: whether a row with this largest logit, infinity where one is NaN, can be drawn from."""
    return tl.where(largest == float("inf"), BAD_LOGITS, tl.where(largest == float("-inf"), ALL_MASKED, OK))


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
    first = value_of_key(low)
    border = tl.where(by_value, ordered_key(first + (value_of_key(high) - first) * (part / 8)), by_key)
    return tl.maximum(tl.minimum(border, high - 1), low)


@triton.jit
def _find(
    x_ptr, size, largest, temperature, scale, low, high, above, bound, target, IS_BOUND: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Return the smallest key whose greater ones have a mass that is below, that mass, and its count.

    `above` is the mass of keys above `high`, which is below. The count is 0 where no key is within.
    """
    v = tl.arange(0, BLOCK)
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
        for at in range(0, size, BLOCK):
            x = tl.load(x_ptr + at + v, mask=at + v < size, other=float("-inf"))
            key = ordered_key(x)
            inside = (key >= low) & (key <= high) & (at + v < size)
            mass = tl.where(inside, integer_mass(x, largest, temperature, scale), 0)
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
        if lowest >= highest:
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
def _answer(
    x_ptr, vocab, list_ptr, num_listed, largest, temperature, scale, lowest, highest, low, high, above,
    bound, target, IS_BOUND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Return what `_find` does for the row, and whether it was found among the listed tokens.

    The list holds every token between the keys `low` and `high`, with the mass `above` of those beyond; it
    counts as empty with `num_listed` -1. All that has a mass lies between `lowest` and `highest`.
    """
    is_listed = (num_listed > 0) & _is_below(above, bound, target, IS_BOUND)
    is_open = True
    found, before, count = low, above, tl.full((), 0, tl.int32)
    while is_open:
        source, size, first, last, base = x_ptr, vocab, lowest, highest, above - above
        if is_listed:
            source, size, first, last, base = list_ptr, num_listed, low, high, above
        found, before, count = _find(
            source, size, largest, temperature, scale, first, last, base, bound, target, IS_BOUND, BLOCK
        )
        # The next smaller logit, wherever it is, must not be an answer too.
        through = before + count.to(tl.int64) * integer_mass(value_of_key(found), largest, temperature, scale)
        is_certain = (count > 0) & (_is_below(through, bound, target, IS_BOUND) == 0)
        is_open = is_listed & (is_certain == 0)
        is_listed = is_listed & is_certain
    return found, before, count, is_listed


@triton.jit
def _tighten(low, low_mass, high, high_mass, border, mass, target, slack):
    """Return an interval of logits, and the masses above its ends, in the light of one border."""
    is_low = (mass > target + slack) & (border > low)
    is_high = (mass < target - slack) & (border < high)
    low, low_mass = tl.where(is_low, border, low), tl.where(is_low, mass, low_mass)
    high, high_mass = tl.where(is_high, border, high), tl.where(is_high, mass, high_mass)
    return low, low_mass, high, high_mass


@triton.jit
def _tighten_all(
    low, low_mass, high, high_mass, target, slack,
    b0, b1, b2, b3, b4, b5, b6, b7, m0, m1, m2, m3, m4, m5, m6, m7,
):  # fmt: skip
    low, low_mass, high, high_mass = _tighten(low, low_mass, high, high_mass, b0, m0, target, slack)
    low, low_mass, high, high_mass = _tighten(low, low_mass, high, high_mass, b1, m1, target, slack)
    low, low_mass, high, high_mass = _tighten(low, low_mass, high, high_mass, b2, m2, target, slack)
    low, low_mass, high, high_mass = _tighten(low, low_mass, high, high_mass, b3, m3, target, slack)
    low, low_mass, high, high_mass = _tighten(low, low_mass, high, high_mass, b4, m4, target, slack)
    low, low_mass, high, high_mass = _tighten(low, low_mass, high, high_mass, b5, m5, target, slack)
    low, low_mass, high, high_mass = _tighten(low, low_mass, high, high_mass, b6, m6, target, slack)
    low, low_mass, high, high_mass = _tighten(low, low_mass, high, high_mass, b7, m7, target, slack)
    return low, low_mass, high, high_mass


@triton.jit
def _guess(low, low_mass, high, high_mass, target):
    """Return four borders about where mass that is spread evenly over an interval reaches a target."""
    share = (target - high_mass) / tl.maximum(low_mass - high_mass, 1e-30)
    share = tl.minimum(tl.maximum(share, 0.03), 0.97)
    span = high - low
    wide, near = tl.minimum(0.15, 0.7 * share), 0.025
    far = tl.minimum(0.15, 0.7 * (1 - share))
    return (
        high - span * (share - wide),
        high - span * (share - near),
        high - span * (share + near),
        high - span * (share + far),
    )


@triton.jit
def _estimate(x_ptr, vocab, temperature, top_p, uniform, slack_share,
              CAPACITY: tl.constexpr, MAX_ESTIMATES: tl.constexpr,
              LINES: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """Return the largest logit, and between which the nucleus ends and the drawn token lies.

    NaN counts as infinity. The intervals are right as far as float32 can tell, where the largest is finite.
    """
    v = tl.arange(0, LINES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    factor = 1.4426950408889634 / temperature
    # Masses are taken relative to a logit near the largest, which the first pass finds.
    x = tl.load(x_ptr + v, mask=v < vocab, other=float("-inf"))
    reference = tl.max(tl.max(tl.where(x < float("inf"), x, float("-inf")), 1), 0)
    reference = tl.where(reference > float("-inf"), reference, 0.0)
    low, high, drawn_low, drawn_high = reference, reference, reference, reference
    largest, low_mass, high_mass, drawn_low_mass, drawn_high_mass = low, low, low, low, low
    b0, b1, b2, b3, b4, b5, b6, b7 = _first_borders(reference, temperature)
    num_passes = 0
    is_open = True
    while is_open:
        nothing = tl.zeros((WIDTH,), tl.float32)
        s0, s1, s2, s3, s4, s5, s6, s7 = (
            nothing, nothing, nothing, nothing, nothing, nothing, nothing, nothing,
        )  # fmt: skip
        totals = nothing
        most = tl.full((WIDTH,), float("-inf"), tl.float32)
        for at in range(0, vocab, LINES * WIDTH):
            x = tl.load(x_ptr + at + v, mask=at + v < vocab, other=float("-inf"))
            most = tl.maximum(most, tl.max(tl.where(x != x, float("inf"), x), 0))
            mass = tl.exp2((x - reference) * factor)
            totals += tl.sum(mass, 0)
            s0 += tl.sum(mass * (x > b0).to(tl.float32), 0)
            s1 += tl.sum(mass * (x > b1).to(tl.float32), 0)
            s2 += tl.sum(mass * (x > b2).to(tl.float32), 0)
            s3 += tl.sum(mass * (x > b3).to(tl.float32), 0)
            s4 += tl.sum(mass * (x > b4).to(tl.float32), 0)
            s5 += tl.sum(mass * (x > b5).to(tl.float32), 0)
            s6 += tl.sum(mass * (x > b6).to(tl.float32), 0)
            s7 += tl.sum(mass * (x > b7).to(tl.float32), 0)
        # Where zeros of both signs lead, 0.0 stands first.
        largest, total = tl.max(most, 0) + 0.0, tl.sum(totals, 0)
        is_finite = (largest < float("inf")) & (largest > float("-inf"))
        if is_finite & (num_passes == 0) & (tl.abs(largest - reference) > 4 * temperature):
            # Far from what was looked at: begin again from there.
            reference = largest
            b0, b1, b2, b3, b4, b5, b6, b7 = _first_borders(reference, temperature)
        else:
            m0, m1, m2, m3 = tl.sum(s0, 0), tl.sum(s1, 0), tl.sum(s2, 0), tl.sum(s3, 0)
            m4, m5, m6, m7 = tl.sum(s4, 0), tl.sum(s5, 0), tl.sum(s6, 0), tl.sum(s7, 0)
            if num_passes == 0:
                low, drawn_low, high, drawn_high = _ends(largest, temperature)
                low_mass, drawn_low_mass, high_mass, drawn_high_mass = total, total, total * 0, total * 0
            bound, slack = top_p * total, slack_share * total
            target = uniform * bound
            low, low_mass, high, high_mass = _tighten_all(
                low, low_mass, high, high_mass, bound, slack,
                b0, b1, b2, b3, b4, b5, b6, b7, m0, m1, m2, m3, m4, m5, m6, m7,
            )  # fmt: skip
            drawn_low, drawn_low_mass, drawn_high, drawn_high_mass = _tighten_all(
                drawn_low, drawn_low_mass, drawn_high, drawn_high_mass, target, slack,
                b0, b1, b2, b3, b4, b5, b6, b7, m0, m1, m2, m3, m4, m5, m6, m7,
            )  # fmt: skip
            # Every token between has at least the mass of the lower end.
            listed = (low_mass - high_mass) / tl.exp2((low - reference) * factor)
            listed += (drawn_low_mass - drawn_high_mass) / tl.exp2((drawn_low - reference) * factor)
            num_passes += 1
            is_open = is_finite & (listed > 0.9 * CAPACITY) & (num_passes < MAX_ESTIMATES)
            b0, b1, b2, b3 = _guess(low, low_mass, high, high_mass, bound)
            b4, b5, b6, b7 = _guess(drawn_low, drawn_low_mass, drawn_high, drawn_high_mass, target)
    return largest, low, high, drawn_low, drawn_high


@triton.jit
def _ends(largest, temperature):
    """Return where all intervals begin: below the lower end masses are too small to count."""
    low = largest - 32 * temperature
    return low, low, largest, largest


@triton.jit
def _first_borders(largest, temperature):
    """Return eight borders of logits: a mass falls by e with each temperature, most lies within fourteen."""
    return (
        largest - 0.7 * temperature,
        largest - 1.6 * temperature,
        largest - 2.8 * temperature,
        largest - 4.2 * temperature,
        largest - 5.8 * temperature,
        largest - 7.6 * temperature,
        largest - 10 * temperature,
        largest - 14 * temperature,
    )


@triton.jit
def _list_likely(
    x_ptr, vocab, largest, temperature, scale, low, high, drawn_low, drawn_high, min_mass, listed_ptr,
    ids_ptr, CAPACITY: tl.constexpr, LINES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """List the tokens within two intervals of keys, in the order of ids.

    Returns the mass of all tokens, of those above each interval, of those that min-p allows, and how many
    tokens are listed; -1 of more than a list holds.
    """
    zero = tl.zeros((WIDTH,), tl.int64)
    totals, above_sums, drawn_aboves, larger_ones = zero, zero, zero, zero
    # One token a thread and line: what is listed is stored from where it was loaded.
    v = tl.max_contiguous(tl.arange(0, LINES * WIDTH), 1)
    num_listed = tl.full((), 0, tl.int32)
    for at in range(0, vocab, LINES * WIDTH):
        is_token = at + v < vocab
        x = tl.load(x_ptr + at + v, mask=is_token, other=float("-inf"))
        key = ordered_key(x)
        mass = integer_mass(x, largest, temperature, scale)
        totals += tl.sum(tl.reshape(mass, (LINES, WIDTH)), 0)
        above_sums += tl.sum(tl.reshape(tl.where(key > high, mass, 0), (LINES, WIDTH)), 0)
        drawn_aboves += tl.sum(tl.reshape(tl.where(key > drawn_high, mass, 0), (LINES, WIDTH)), 0)
        if min_mass > 0:
            larger_ones += tl.sum(tl.reshape(tl.where(mass >= min_mass, mass, 0), (LINES, WIDTH)), 0)
        is_listed = ((key >= low) & (key <= high)) | ((key >= drawn_low) & (key <= drawn_high))
        is_listed = is_listed & is_token
        place = num_listed + tl.cumsum(is_listed.to(tl.int32), 0) - 1
        fits = is_listed & (place < CAPACITY)
        tl.store(listed_ptr + place, x, mask=fits)
        tl.store(ids_ptr + place, (at + v).to(tl.int32), mask=fits)
        num_listed += tl.sum(is_listed.to(tl.int32), 0)
    num_listed = tl.where(num_listed > CAPACITY, -1, num_listed)
    return (
        tl.sum(totals, 0), tl.sum(above_sums, 0), tl.sum(drawn_aboves, 0), tl.sum(larger_ones, 0), num_listed,
    )  # fmt: skip


@triton.jit
def nucleus_token(
    x_ptr, vocab, temperature, top_p, min_mass, uniform, listed_ptr, ids_ptr, scale, slack_share,
    BITS: tl.constexpr, CAPACITY: tl.constexpr, MAX_ESTIMATES: tl.constexpr,
    LINES: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Return the token that a row draws, int64, and its status, int32; both lists hold `CAPACITY` tokens."""
    largest, low_x, high_x, drawn_low_x, drawn_high_x = _estimate(
        x_ptr, vocab, temperature, top_p.to(tl.float32), uniform.to(tl.float32), slack_share,
        CAPACITY, MAX_ESTIMATES, LINES, WIDTH,
    )  # fmt: skip
    status = status_of(largest)
    token = tl.full((), 0, tl.int64)
    if status == OK:
        # Below this nothing has a mass.
        bottom, top = ordered_key(largest - temperature * BITS), ordered_key(largest)
        low, high = ordered_key(low_x), ordered_key(high_x)
        drawn_low, drawn_high = ordered_key(drawn_low_x), ordered_key(drawn_high_x)
        total, above, drawn_above, larger, num_listed = _list_likely(
            x_ptr, vocab, largest, temperature, scale, low, high, drawn_low, drawn_high, min_mass, listed_ptr,
            ids_ptr, CAPACITY, LINES, WIDTH,
        )  # fmt: skip
        # What one thread has listed, another reads.
        tl.debug_barrier()
        bound = top_p * total.to(tl.float64)
        end, before, count, _ = _answer(
            x_ptr, vocab, listed_ptr, num_listed, largest, temperature, scale, bottom, top, low, high,
            above, bound, total, True, BLOCK,
        )  # fmt: skip
        own = integer_mass(value_of_key(end), largest, temperature, scale)
        # How many of the tokens at the end are inside: the first always, others while the bound holds.
        inside, outside = tl.full((), 1, tl.int32), count + 1
        while outside - inside > 1:
            middle = (inside + outside) // 2
            if (before + (middle - 1).to(tl.int64) * own).to(tl.float64) < bound:
                inside = middle
            else:
                outside = middle
        kept = before + inside.to(tl.int64) * own
        kept = tl.where(own < min_mass, tl.minimum(before, larger), kept)
        target = (uniform * kept.to(tl.float64)).to(tl.int64)
        target = tl.minimum(target, kept - 1)
        drawn, before, count, is_drawn_listed = _answer(
            x_ptr, vocab, listed_ptr, num_listed, largest, temperature, scale, end, top, drawn_low,
            drawn_high, drawn_above, bound, target, False, BLOCK,
        )  # fmt: skip
        own = tl.maximum(integer_mass(value_of_key(drawn), largest, temperature, scale), 1)
        rank = ((target - before) // own).to(tl.int32)
        source, size = x_ptr, vocab
        if is_drawn_listed:
            source, size = listed_ptr, num_listed
        place = _place_of(source, size, drawn, rank, BLOCK)
        token = place.to(tl.int64)
        if is_drawn_listed:
            token = tl.load(ids_ptr + place).to(tl.int64)
    return token, status


@triton.jit(
    do_not_specialize=["top_p_stride", "uniform_stride", "has_min"],
    do_not_specialize_on_alignment=["temperature_ptr", "top_p_ptr", "min_mass_ptr", "uniform_ptr"],
)
def _draw_nucleus(
    x_ptr, temperature_ptr, top_p_ptr, min_mass_ptr, uniform_ptr, listed_ptr, ids_ptr, out_ptr, status_ptr,
    row_stride, top_p_stride, uniform_stride, has_min, vocab, scale, slack_share,
    BITS: tl.constexpr, CAPACITY: tl.constexpr, MAX_ESTIMATES: tl.constexpr,
    LINES: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    top_p, uniform = tl.load(top_p_ptr + row * top_p_stride), tl.load(uniform_ptr + row * uniform_stride)
    min_mass = tl.load(min_mass_ptr + row, mask=has_min != 0, other=0)
    token, status = nucleus_token(
        x_ptr + row * row_stride, vocab, tl.load(temperature_ptr + row), top_p, min_mass, uniform,
        listed_ptr + row * CAPACITY, ids_ptr + row * CAPACITY, scale, slack_share,
        BITS, CAPACITY, MAX_ESTIMATES, LINES, WIDTH, BLOCK,
    )  # fmt: skip
    tl.store(out_ptr + row, token)
    tl.store(status_ptr + row, status.to(tl.int8))


@triton.jit
def _place_of(x_ptr, size, key, rank, BLOCK: tl.constexpr):
    """Return where, in the order of ids, the logit of a key stands with `rank` equal ones before it."""
    v = tl.arange(0, BLOCK)
    seen, place, at = tl.full((), 0, tl.int32), tl.full((), 0, tl.int32), tl.full((), 0, tl.int32)
    while (at < size) & (seen <= rank):
        x = tl.load(x_ptr + at + v, mask=at + v < size, other=float("-inf"))
        is_equal = ((ordered_key(x) == key) & (at + v < size)).to(tl.int32)
        number = tl.sum(is_equal, 0)
        if seen + number > rank:
            found = (is_equal > 0) & (seen + tl.cumsum(is_equal, 0) - 1 == rank)
            place = at + tl.max(tl.where(found, v, 0), 0)
        seen += number
        at += BLOCK
    return place


def draw_nucleus(
    x_NV: Tensor,
    temperature_N: Tensor,
    top_p_N: Tensor,
    min_mass_N: Tensor | None,
    uniform_N: Tensor,
    *,
    bits: int,
    capacity: int = CAPACITY,
) -> tuple[Tensor, Tensor]:
    """Return one token id per row, int64 [N], and whether it is sound, int8 [N]. Only enqueues.

    `x_NV` are float32 logits with adjacent elements; temperature is float32, top-p and the noise float64
    (columns of wider tensors, if need be), the least mass that min-p allows int64. Lists hold `capacity`
    tokens. A status is 1 where a logit is NaN or infinite, 2 where none is above -inf; then the token is 0.
    """
    assert temperature_N.is_contiguous()
    rows, vocab = x_NV.shape
    out_N = torch.empty(rows, dtype=torch.int64, device=x_NV.device)
    status_N = torch.empty(rows, dtype=torch.int8, device=x_NV.device)
    listed = torch.empty(rows, capacity, dtype=torch.float32, device=x_NV.device)
    ids = torch.empty(rows, capacity, dtype=torch.int32, device=x_NV.device)
    _draw_nucleus[(rows,)](
        x_NV, temperature_N, top_p_N, out_N if min_mass_N is None else min_mass_N, uniform_N, listed, ids,
        out_N, status_N, x_NV.stride(0), top_p_N.stride(0), uniform_N.stride(0),
        int(min_mass_N is not None), vocab, 2.0**bits, SLACK, BITS=bits, CAPACITY=capacity,
        MAX_ESTIMATES=MAX_ESTIMATES, LINES=LINES, WIDTH=WIDTH, BLOCK=BLOCK, num_warps=WARPS,
        maxnreg=MAX_REGISTERS,
    )  # fmt: skip
    return out_N, status_N
