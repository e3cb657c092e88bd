"""Which rows of a step begin with the same pages, so that reading these once for all of them pays?

Rows that were admitted with the same cached beginning name the same pages, block by block. A group of m rows
with n common positions spares (m - 1) n of them; where rows share much with some and little with all, those
groups are made that spare the most together. Groups and steps that spare too little to pay for
another kernel and for joining are left out.
Invariants: a pure function of integers; a row is in one group at most, every group has two rows at least, and
no group reaches into a row's last known position, so that each row has one of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from slipstream.kernels.shared_prefix import MAX_GROUPS, SharedGroup

PAGE_BITS = 32
MIN_STEP_BYTES = 192 << 20
MIN_GROUP_BYTES = 4 << 20
# How often rows that begin alike are looked at again where they part; what begins like this is rare.
MAX_FORKS = 8


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SharingRule:
    """When sharing pays: by the positions that a group, and all of a step together, must spare.

    A layer's kernel more and the joining of parts take an H100 some 25 us, and what many rows share comes
    from the L2 anyway: 64 rows behind 512 positions of an 8B model lose 11 us by it (132 MB spared), 16
    behind 4,096 gain 15 (252 MB).
    """

    page_tokens: int
    min_group_tokens: int
    min_step_tokens: int

    @classmethod
    def create(cls, *, page_tokens: int, token_bytes: int) -> SharingRule:
        """Return the rule for a layer whose keys and values take `token_bytes` for a position."""
        return cls(
            page_tokens=page_tokens,
            min_group_tokens=-(-MIN_GROUP_BYTES // token_bytes),
            min_step_tokens=-(-MIN_STEP_BYTES // token_bytes),
        )


class Beginning:
    """The pages of a row's leading full blocks; of several cache groups all of theirs, block by block."""

    def __init__(self, pages: Sequence[Sequence[int]]) -> None:
        self.num_blocks = min((len(group) for group in pages), default=0)
        self._width = len(pages)
        in_order = [group[i] for i in range(self.num_blocks) for group in pages]
        # As one number, two rows are compared in one operation, however many blocks they have.
        digits = b"".join(page.to_bytes(PAGE_BITS // 8, "little") for page in in_order)
        self._number = int.from_bytes(digits, "little")

    def common_blocks(self, other: Beginning) -> int:
        """Return how many leading blocks are the same."""
        most = min(self.num_blocks, other.num_blocks)
        difference = self._number ^ other._number
        if difference == 0:
            return most
        lowest_bit = (difference & -difference).bit_length() - 1
        return min(most, lowest_bit // (PAGE_BITS * self._width))

    def block(self, idx: int) -> int:
        """Return a number that stands for the pages of block `idx`, -1 behind the last."""
        if idx >= self.num_blocks:
            return -1
        bits = PAGE_BITS * self._width
        return self._number >> (idx * bits) & ((1 << bits) - 1)


@dataclasses.dataclass(frozen=True, slots=True)
class _Fork:
    """Rows that agree in their first `blocks` blocks: those that agree further, and those that do not."""

    blocks: int
    forks: list[_Fork]
    rows: list[int]


class _Choice(NamedTuple):
    """What is spared below a fork, the groups made there, and the rows left to a group above."""

    spared: int
    groups: list[tuple[list[int], int]]
    rows: list[int]


def find_groups(beginnings: Sequence[Beginning], rule: SharingRule) -> list[SharedGroup]:
    """Return the groups of rows (places in `beginnings`) whose common beginning is worth reading once.

    In the order of what they spare, the most first, `MAX_GROUPS` at most.
    """
    root = _fork_at(list(range(len(beginnings))), 0, beginnings, MAX_FORKS)
    found = _choose(root, 0).groups
    groups = [SharedGroup(tuple(sorted(rows)), blocks * rule.page_tokens) for rows, blocks in found]
    worth = [group for group in groups if _spared(group) >= rule.min_group_tokens]
    worth = sorted(worth, key=_spared, reverse=True)[:MAX_GROUPS]
    return worth if sum(map(_spared, worth)) >= rule.min_step_tokens else []


def _spared(group: SharedGroup) -> int:
    return (len(group.rows) - 1) * group.tokens


def _fork_at(rows: list[int], blocks: int, beginnings: Sequence[Beginning], depth: int) -> _Fork:
    """Return the fork of rows that agree in so many blocks; `depth` bounds how often they fork again."""
    by_next: dict[int, list[int]] = {}
    for row in rows:
        by_next.setdefault(beginnings[row].block(blocks), []).append(row)
    alone = by_next.pop(-1, [])
    forks: list[_Fork] = []
    for members in by_next.values():
        if len(members) == 1 or depth == 0:
            alone += members
            continue
        first = beginnings[members[0]]
        common = min(first.common_blocks(beginnings[row]) for row in members[1:])
        forks.append(_fork_at(members, common, beginnings, depth - 1))
    return _Fork(blocks, forks, alone)


def _choose(fork: _Fork, above: int) -> _Choice:
    """Return the groups that spare the most; a row left to a group above spares `above` blocks.

    A group at a fork spares each of its rows the fork's blocks, and reads them once.
    """
    left = _sum_up([_choose(inner, above) for inner in fork.forks], fork.rows, above)
    if fork.blocks == above:
        return left
    opened = _sum_up([_choose(inner, fork.blocks) for inner in fork.forks], fork.rows, fork.blocks)
    if opened.spared - fork.blocks <= left.spared:
        return left
    groups = [*opened.groups, (opened.rows, fork.blocks)]
    return _Choice(opened.spared - fork.blocks, groups, [])


def _sum_up(choices: list[_Choice], rows: list[int], above: int) -> _Choice:
    spared = sum(choice.spared for choice in choices) + above * len(rows)
    groups = [group for choice in choices for group in choice.groups]
    return _Choice(spared, groups, rows + [row for choice in choices for row in choice.rows])
