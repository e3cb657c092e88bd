"""Which merges does a SentencePiece vocabulary imply?

SentencePiece BPE stores pieces with scores and no merges: of all neighbours whose join is a piece, it joins
the pair whose piece scores highest (Kudo and Richardson, `SentencePiece`, arXiv:1808.06226). As a merge list:
every way to cut a piece into two pieces, ordered by the piece's score; among cuts of one piece the longest
left part first.

A quarter of a million pieces have 1.5 million places to cut. Looking each up as strings takes seconds, so
both sides are looked up by a polynomial hash of their characters (Karp and Rabin, IBM J. Res. Dev. 31(2),
1987), for all places at once. Invariant: hashes only propose. Every merge is checked letter by letter, and
a vocabulary with a collision, which somebody would have to construct, is cut the slow way.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np

Merge = tuple[str, str]
Integers = np.ndarray[Any, np.dtype[Any]]

# Odd, so that they have inverses modulo 2^64; otherwise arbitrary.
BASE = 0x9E3779B97F4A7C15
MIX = 0xBF58476D1CE4E5B9


def merge_rules(pieces: Sequence[str], priority: Sequence[float], eligible: Sequence[bool]) -> list[Merge]:
    """Return the merges that `pieces` imply, first the ones to apply first.

    `pieces` are distinct. `priority[i]` ranks piece i, higher first, ties by index; pieces that are not
    `eligible` (control and byte tokens, which text never spells) take no part.
    """
    taken = [i for i, piece in enumerate(pieces) if eligible[i] and piece]
    texts = [pieces[i] for i in taken]
    if not texts:
        return []
    ranks = np.asarray(priority, dtype=np.float64)[taken]
    by_rank = np.lexsort((np.arange(len(texts)), -ranks))
    owners, lefts, rights = find_cuts(texts)
    lengths = np.fromiter(map(len, texts), dtype=np.int64, count=len(texts))
    place = np.empty_like(by_rank)
    place[by_rank] = np.arange(len(texts))
    keys = place[owners] * (lengths.max() + 1) - lengths[lefts]
    order = np.argsort(keys)
    left, right, whole = (
        list(map(texts.__getitem__, part[order].tolist())) for part in (lefts, rights, owners)
    )
    # As many entries as cuts or more, each a cut and no two the same: these are the cuts.
    if list(map(operator.add, left, right)) == whole and bool((np.diff(keys[order]) > 0).all()):
        return list(zip(left, right, strict=True))
    return find_cuts_slowly(texts, by_rank.tolist())


def find_cuts(texts: list[str]) -> tuple[Integers, Integers, Integers]:
    """Return (piece, left part, right part) of every cut, as indices of `texts`, by hash."""
    lengths = np.fromiter(map(len, texts), dtype=np.int64, count=len(texts))
    ends = np.cumsum(lengths)
    starts = ends - lengths
    joined = "".join(texts).encode("utf-32-le", "surrogatepass")
    hashed = SpanHashes(np.frombuffer(joined, dtype="<u4"))
    whole = hashed.of(starts, ends)
    by_hash = np.argsort(whole)
    sorted_hashes = whole[by_hash]

    def look_up(hashes: Integers) -> Integers:
        place = np.minimum(np.searchsorted(sorted_hashes, hashes), len(texts) - 1)
        return np.where(sorted_hashes[place] == hashes, by_hash[place], -1)

    owners = np.repeat(np.arange(len(texts)), lengths)
    cuts = np.arange(len(owners))
    is_inside = cuts != starts[owners]
    owners, cuts = owners[is_inside], cuts[is_inside]
    lefts = look_up(hashed.of(starts[owners], cuts))
    owners, cuts, lefts = owners[lefts >= 0], cuts[lefts >= 0], lefts[lefts >= 0]
    rights = look_up(hashed.of(cuts, ends[owners]))
    is_cut = rights >= 0
    return owners[is_cut], lefts[is_cut], rights[is_cut]


class SpanHashes:
    """Hashes of spans of one text, modulo 2^64: sums of characters times powers of a base, shifted to 0."""

    def __init__(self, characters: Integers) -> None:
        mixed = (characters.astype(np.uint64) + np.uint64(1)) * np.uint64(MIX)
        mixed ^= mixed >> np.uint64(29)
        sums = np.cumsum(mixed * powers(BASE, len(mixed)), dtype=np.uint64)
        self._sums = np.concatenate([np.zeros(1, dtype=np.uint64), sums])
        self._shifts = powers(pow(BASE, -1, 1 << 64), len(mixed))

    def of(self, starts: Integers, stops: Integers) -> Integers:
        return (self._sums[stops] - self._sums[starts]) * self._shifts[starts]


def powers(base: int, count: int) -> Integers:
    factors = np.full(count, base, dtype=np.uint64)
    factors[:1] = 1
    return np.multiply.accumulate(factors)


def find_cuts_slowly(texts: list[str], order: list[int]) -> list[Merge]:
    known = set(texts)
    return [
        (text[:length], text[length:])
        for text in (texts[i] for i in order)
        for length in range(len(text) - 1, 0, -1)
        if text[:length] in known and text[length:] in known
    ]
