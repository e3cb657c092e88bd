"""Is every shared position of a row in one entry, and does the definition follow the first row's table?"""

from __future__ import annotations

import random

import pytest
import torch

from slipstream.kernels.decode_borders import decode_borders
from slipstream.kernels.paged_decode import paged_decode
from slipstream.kernels.shared_prefix import CHUNK_STEP, MAX_GROUPS, PrefixLayout, SharedGroup
from slipstream.kernels.shared_prefix_decode import shared_prefix_decode_op
from tests.kernels.gpu.shared_rows import make_step


@pytest.mark.parametrize("seed", range(6))
def test_entries_cover_what_is_shared(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(20):
        heads, kv_heads = rng.choice((1, 2, 3, 4, 8, 64)), rng.choice((1, 2, 8))
        layout = PrefixLayout(
            max_rows=rng.randint(40, 90), heads=heads, kv_heads=kv_heads, programs=rng.choice((12, 264))
        )
        step_rows = rng.randint(2, layout.max_rows)
        rows = rng.sample(range(step_rows), step_rows)
        groups: list[SharedGroup] = []
        while len(rows) > 1 and len(groups) < MAX_GROUPS and rng.random() < 0.9:
            count = rng.randint(2, len(rows))
            groups.append(SharedGroup(tuple(rows[:count]), 16 * rng.randint(1, 400)))
            rows = rows[count:]
        views = layout.views(torch.from_numpy(layout.pack(groups)), step_rows)
        assert all(view.dtype == torch.int32 for view in views)
        count = int(views.count_1)
        assert count <= layout.max_entries(step_rows) == len(views.entries_E5)
        entries, members = views.entries_E5.tolist(), views.members_R.tolist()
        seen = 0
        for group_rows, tokens in groups:
            for row in group_rows:
                shared, first, number, step, place = views.rows_5R[:, row].tolist()
                position = 0
                for entry in entries[first : first + number * step : step]:
                    start, size, leader, low, high = entry
                    assert members[start + place] == row and place < size <= 64 // heads
                    assert leader == group_rows[0] and low == position < high and low % CHUNK_STEP == 0
                    position = high
                    seen += 1
                assert position == tokens == shared
        assert seen == sum(entry[1] for entry in entries[:count])
        others = set(range(step_rows)) - {row for group in groups for row in group.rows}
        assert not views.rows_5R[:, sorted(others)].any()


def test_p19_fills_a_gpu_once() -> None:
    """64 rows that share 4,096 positions, 8 kv heads, 264 programs: 4 tiles of 16 rows, 8 chunks of 512."""
    layout = PrefixLayout(max_rows=256, heads=4, kv_heads=8, programs=264)
    packed = torch.from_numpy(layout.pack([SharedGroup(tuple(range(64)), 4096)]))
    views = layout.views(packed, 64)
    assert int(views.count_1) == 32 and layout.max_entries(64) == 4 + MAX_GROUPS + 33
    assert {entry[4] - entry[3] for entry in views.entries_E5[:32].tolist()} == {512}
    assert layout.max_entries(256) * 8 * 64 * 130 * 4 < 24 << 20
    assert all(view.storage_offset() % 4 == 0 for view in views)


@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_the_definition_is_that_of_rows_alone(softcap: float) -> None:
    groups = [SharedGroup((0, 3), 32), SharedGroup((5, 1, 2), 48)]
    step = make_step([40, 90, 49, 33, 7, 120, 0], groups, (4, 2, 8))
    borders = decode_borders(step.lens_R, step.shared.rows_5R[0], 2, 32, 0, 6)
    out, expected = torch.full_like(step.q_RNH, torch.nan), torch.full_like(step.q_RNH, torch.nan)
    counters, scale = torch.zeros(8, dtype=torch.int32), 0.3
    given = (step.q_RNH, step.pages, step.table_RC, step.lens_R, borders, *step.shared)
    shared_prefix_decode_op(*given, out, counters, scale, softcap)
    alone = (step.q_RNH, step.pages, step.whole_RC, step.lens_R)
    paged_decode(*alone, expected, counters, 0, scale, 0, softcap)
    assert torch.equal(out, expected) and bool(out.isfinite().all())
    arguments = (*given, torch.empty_like(out), counters, scale, softcap)
    torch.library.opcheck(shared_prefix_decode_op, arguments, test_utils=("test_schema", "test_faketensor"))
