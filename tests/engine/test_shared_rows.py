"""Are rows with the same cached beginning found from plans alone, as they join, grow and leave?"""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from slipstream.attention import shared_prefix
from slipstream.attention.torch_reference import TorchReference
from slipstream.attention.triton import TritonAttention
from slipstream.core.cache_group import CacheGroup
from slipstream.core.plan import RequestInit, StepPlan
from slipstream.core.sampling_params import RowSampling
from slipstream.engine.shared_rows import SharedRows, shares_beginnings
from slipstream.kernels.shared_prefix import SharedPrefixes

FULL = CacheGroup(layers=(0, 1), kind="full", heads=8, head_dim=128, block_tokens=32)
WINDOW = CacheGroup(layers=(2, 3), kind="window", heads=8, head_dim=128, block_tokens=32, window=64)
CPU = torch.device("cpu")
PREFIX = list(range(1, 129))


@dataclasses.dataclass
class Sizes:
    num_heads: int = 32
    num_kv_heads: int = 8


@pytest.fixture(autouse=True)
def few_rows_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_prefix, "MIN_STEP_BYTES", 32 << 20)


def rows_of(*groups: CacheGroup) -> SharedRows:
    return SharedRows(groups, heads=4, max_rows=80, kv_dtype=torch.bfloat16, device=CPU)


def request(row: int, *blocks: list[int], tokens: int = 4096 + 64) -> RequestInit:
    sampling = RowSampling(temperature=0.0)
    numbers = list(range(tokens))
    return RequestInit(row, f"r{row}", numbers, tokens, tokens - 64, list(blocks), sampling, 0, 0)


def plan_of(*added: RequestInit, removed: tuple[int, ...] = (), new_blocks: dict | None = None) -> StepPlan:
    return StepPlan(0, removed=list(removed), added=list(added), new_blocks=new_blocks or {})


def shared_of(views: SharedPrefixes) -> list[int]:
    return views.rows_5R[0].tolist()


def test_rows_join_and_leave() -> None:
    rows = rows_of(FULL)
    rows.apply(plan_of(*(request(row, [*PREFIX, 1000 + row, 2000 + row]) for row in range(8))))
    # A hit of all of it leaves the last token to run, so the block it stands in does not count.
    rows.apply(plan_of(request(8, [*PREFIX], tokens=4096), request(9, [*range(5000, 5130)])))
    step = [9, 3, 8, 0, 1, 2, 4, 5]
    assert rows.of_step(step)
    assert shared_of(rows.views(10)) == [0, 4064, 4064, 4064, 4064, 4064, 4064, 4064, 0, 0]
    address = rows.views(4).rows_5R.data_ptr()
    rows.apply(plan_of(removed=(8,)))
    assert rows.of_step([3, 0, 1, 2, 4, 5])
    assert shared_of(rows.views(7)) == [4096] * 6 + [0]
    assert rows.views(7).rows_5R.data_ptr() == address and int(rows.views(7).entries_E5[0, 2]) == 0
    rows.count()
    assert (rows.num_steps, rows.num_rows, rows.num_spared_positions) == (1, 6, 5 * 4096)
    assert not rows.of_step([3, 9]) and not rows.of_step([9])


def test_a_row_that_is_reissued_is_another() -> None:
    rows = rows_of(FULL)
    rows.apply(plan_of(*(request(row, [*PREFIX, 1000 + row]) for row in range(6))))
    step = list(range(6))
    assert rows.of_step(step) and shared_of(rows.views(6)) == [4096] * 6
    # Freed pages may come again in another order, or for something else.
    rows.apply(plan_of(request(2, [*PREFIX[:64], *range(3000, 3065)]), removed=(2,)))
    assert rows.of_step(step) and shared_of(rows.views(6)) == [4096, 4096, 0, 4096, 4096, 4096]
    rows.apply(plan_of(request(2, PREFIX[::-1]), removed=(2,)))
    assert rows.of_step(step) and shared_of(rows.views(6)) == [4096, 4096, 0, 4096, 4096, 4096]


def test_tables_grow_while_a_prompt_runs_and_not_behind_it() -> None:
    rows = rows_of(FULL)
    rows.apply(plan_of(request(0, PREFIX[:16]), *(request(row, [*PREFIX, 1000 + row]) for row in (1, 2, 3))))
    for at in range(16, 128, 16):
        rows.apply(plan_of(new_blocks={0: [(0, PREFIX[at : at + 16])]}))
    rows.apply(plan_of(new_blocks={0: [(0, [900, 901])]}))
    step = [0, 1, 2, 3]
    assert rows.of_step(step) and shared_of(rows.views(4)) == [4096] * 4
    version = rows.views(4).rows_5R._version
    # Blocks of generated tokens change nothing, so nothing is looked for or written.
    rows.apply(plan_of(new_blocks={0: [(0, [902]), (1, [903])]}))
    assert rows.of_step(step) and rows.views(4).rows_5R._version == version


def test_a_captured_step_of_nobody_shares_nothing() -> None:
    rows = rows_of(FULL)
    rows.apply(plan_of(*(request(row, [*PREFIX, 1000 + row]) for row in range(4))))
    assert rows.of_step([0, 1, 2, 3]) and int(rows.views(4).count_1) > 0
    rows.forget_step()
    assert int(rows.views(4).count_1) == 0 and not rows.views(4).rows_5R.any()
    assert rows.of_step([0, 1, 2, 3]) and shared_of(rows.views(4)) == [4096] * 4


def test_groups_of_windows_do_not_count_and_all_full_ones_must_agree() -> None:
    other = [page + 500 for page in PREFIX]
    rows = rows_of(FULL, WINDOW, FULL)
    for row in range(6):
        second = other if row < 5 else [*other[:100], *range(7000, 7028)]
        rows.apply(plan_of(request(row, [*PREFIX, 1000 + row], [0] * 128 + [3000 + row], second)))
    assert rows.of_step([0, 1, 2, 3, 4]) and shared_of(rows.views(5)) == [4096] * 5
    assert rows.of_step([0, 1, 2, 3, 5]) and shared_of(rows.views(5))[0] in (4096, 3200)


@pytest.mark.parametrize(
    ("sizes", "groups", "max_rows", "expected"),
    [
        (Sizes(), [WINDOW, FULL], 8, True),
        (Sizes(num_heads=65, num_kv_heads=1), [FULL], 8, False),
        (None, [FULL], 8, False),
        (Sizes(), [WINDOW], 8, False),
        (Sizes(), [FULL], 1, False),
    ],
)
def test_who_has_a_use_for_it(
    sizes: Sizes | None, groups: list[CacheGroup], max_rows: int, expected: bool
) -> None:
    model: Any = SimpleNamespace(config=sizes)
    assert shares_beginnings(TritonAttention(), model, groups, max_rows) == expected
    assert not shares_beginnings(TorchReference(), model, groups, max_rows)
