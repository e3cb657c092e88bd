"""Are groups of rows found that begin with the same pages, all of them, and only where it pays?"""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from slipstream.attention.shared_prefix import MAX_FORKS, Beginning, SharingRule, find_groups
from slipstream.kernels.shared_prefix import MAX_GROUPS, SharedGroup

ANYTHING = SharingRule(page_tokens=16, min_group_tokens=1, min_step_tokens=1)


def groups_of(tables: list[list[int]], rule: SharingRule = ANYTHING) -> list[SharedGroup]:
    return find_groups([Beginning([table]) for table in tables], rule)


def common(tables: list[list[int]]) -> int:
    alike = (len(set(pages)) == 1 for pages in zip(*tables, strict=False))
    return next((i for i, same in enumerate(alike) if not same), min(map(len, tables)))


def partitions(rows: list[int]) -> Iterator[list[list[int]]]:
    if not rows:
        yield []
        return
    for rest in partitions(rows[1:]):
        yield [[rows[0]], *rest]
        for i, part in enumerate(rest):
            yield [*rest[:i], [rows[0], *part], *rest[i + 1 :]]


def test_rows_in_any_order_and_several_groups() -> None:
    tables = [[1, 2, 3, 90], [7, 8, 91], [1, 2, 3, 92, 93], [60], [], [7, 8, 94], [1, 2, 3]]
    assert groups_of(tables) == [SharedGroup((0, 2, 6), 48), SharedGroup((1, 5), 32)]
    assert groups_of([[5, 6], [6, 5], [7]]) == [] == groups_of([]) == groups_of([[1, 2, 3]])


def test_a_page_at_another_place_is_not_shared() -> None:
    assert groups_of([[4, 1, 2], [5, 1, 2]]) == []
    assert groups_of([[1, 4, 2], [1, 5, 2]]) == [SharedGroup((0, 1), 16)]


def test_what_all_share_against_what_some_do() -> None:
    few = [[1, *range(10, 30)], [1, *range(10, 30)]]
    assert groups_of([*few, [1, 40]]) == [SharedGroup((0, 1), 21 * 16)]
    many = [[1, 2, 3, 4, 10 + i // 2, 50 + i] for i in range(6)]
    assert groups_of(many) == [SharedGroup((0, 1, 2, 3, 4, 5), 64)]


def test_all_cache_groups_must_agree() -> None:
    first = Beginning([[1, 2, 3], [11, 12, 13]])
    second = Beginning([[1, 2, 3, 4], [11, 12, 99, 14]])
    assert first.common_blocks(second) == 2 and first.common_blocks(first) == 3
    assert find_groups([first, second], ANYTHING) == [SharedGroup((0, 1), 32)]


@pytest.mark.parametrize("seed", range(5))
def test_nothing_better_can_be_found(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(30):
        tables: list[list[int]] = []
        for _ in range(rng.randint(1, 6)):
            start = list(rng.choice(tables))[: rng.randint(0, 6)] if tables and rng.random() < 0.8 else []
            tables.append(start + [rng.randint(1, 2**31) for _ in range(rng.randint(0, 4))])
        groups = groups_of(tables)
        rows = [row for group in groups for row in group.rows]
        assert len(rows) == len(set(rows)) and all(len(group.rows) > 1 for group in groups)
        for group in groups:
            assert group.tokens == 16 * common([tables[row] for row in group.rows])
        best = max(
            sum((len(part) - 1) * common([tables[row] for row in part]) for part in parts)
            for parts in partitions(list(range(len(tables))))
        )
        assert sum((len(group.rows) - 1) * group.tokens for group in groups) == 16 * best


def test_rows_that_part_again_and_again() -> None:
    """Row i begins with the blocks of row i - 1: too deep to be taken apart everywhere."""
    groups = groups_of([list(range(1, 10 + i)) for i in range(600)])
    assert sum(len(group.rows) for group in groups) >= 600 - MAX_FORKS


def test_it_pays_or_is_left_out() -> None:
    tables = [[1, 2, 30], [1, 2, 31], [7, 32], [7, 33]]
    rule = SharingRule(page_tokens=16, min_group_tokens=32, min_step_tokens=1)
    assert groups_of(tables, rule) == [SharedGroup((0, 1), 32)]
    assert groups_of(tables, SharingRule(page_tokens=16, min_group_tokens=1, min_step_tokens=48)) != []
    assert groups_of(tables, SharingRule(page_tokens=16, min_group_tokens=1, min_step_tokens=49)) == []
    assert groups_of(tables, SharingRule(page_tokens=16, min_group_tokens=32, min_step_tokens=33)) == []


def test_the_rule_of_an_8b_model() -> None:
    """4 KiB a position and layer: 64 rows with 4,096 in common do, two with 1,024 do not."""
    rule = SharingRule.create(page_tokens=32, token_bytes=4096)
    pages = list(range(1, 129))
    assert groups_of([[*pages, 200 + i] for i in range(64)], rule) == [SharedGroup(tuple(range(64)), 4096)]
    assert groups_of([pages[:32], pages[:32]], rule) == []
    assert groups_of([pages[:32]] * 48, rule) == []
    assert groups_of([pages[:32]] * 49, rule) == [SharedGroup(tuple(range(49)), 1024)]


def test_the_groups_that_spare_most_are_kept() -> None:
    tables = [
        [100 + i, *range(1000 + 50 * i, 1000 + 51 * i)] for i in range(MAX_GROUPS + 8) for _ in range(2)
    ]
    groups = groups_of(tables)
    assert len(groups) == MAX_GROUPS and [g.tokens for g in groups] == sorted(g.tokens for g in groups)[::-1]
    assert groups[0].rows == (2 * MAX_GROUPS + 14, 2 * MAX_GROUPS + 15)
