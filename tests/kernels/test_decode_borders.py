"""Is the work of ragged rows cut into shares that are equal, cover all of it and leave no crumbs?"""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from slipstream.kernels.decode_borders import decode_borders
from slipstream.kernels.decode_shares import SHORTEST, keys_of_unit

KEYS = 32


def items_of(lens: list[int], unread: list[int], kv_heads: int, window: int) -> list[tuple[int, int, int]]:
    """Return (row * K + kv head, first unit, last unit + 1) of all that has units, in order."""
    items, unit = [], 0
    for row, (length, skipped) in enumerate(zip(lens, unread, strict=True)):
        first = max(min(skipped, length), length - window if window else 0)
        count = -(-(length - first) // KEYS)
        for kv_head in range(kv_heads):
            if count:
                items.append((row * kv_heads + kv_head, unit, unit + count))
            unit += count
    return items


@pytest.mark.parametrize("seed", range(8))
def test_shares(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(40):
        rows, kv_heads, programs = rng.randint(1, 20), rng.randint(1, 4), rng.randint(1, 60)
        lens = [rng.choice((0, rng.randint(1, 60), rng.randint(1, 3000))) for _ in range(rows)]
        window = rng.choice((0, 0, 100))
        unread = [rng.choice((0, 64, 2048)) if not window else 0 for _ in lens]
        skipped = torch.tensor(unread, dtype=torch.int32)
        borders = decode_borders(torch.tensor(lens), skipped, kv_heads, KEYS, window, programs)
        assert borders.shape == (programs + 2, 4) and borders.dtype == torch.int32
        items = items_of(lens, unread, kv_heads, window)
        total = items[-1][2] if items else 0
        lines, (share, longer, _, _) = borders[:-1].tolist(), borders[-1].tolist()
        ends = [line[0] for line in lines]
        assert ends[0] == 0 and ends[-1] == total and ends == sorted(ends)
        shares = min(programs, max(1, total // SHORTEST))
        assert share * shares + longer == total and 0 <= longer < shares
        # Each end moves by less than the shortest share.
        assert all(b - a <= share + 1 + 2 * (SHORTEST - 1) for a, b in itertools.pairwise(ends))
        for unit, item, start, length in lines:
            if start == total:
                continue
            assert length == lens[item // kv_heads]
            number, first, last = next(entry for entry in items if entry[1] <= start < entry[2])
            assert (item, start) == (number, first) and first <= unit <= last
            assert unit in (first, last) or SHORTEST <= unit - first <= last - first - SHORTEST


def test_even_rows_are_not_cut() -> None:
    """64 rows of 192 tokens and 8 kv heads on 132 multiprocessors: one row and head a program, or none."""
    borders = decode_borders(torch.full((64,), 192), None, 8, 64, 0, 528)
    assert {unit % 3 for unit in borders[:-1, 0].tolist()} == {0}
    assert int((borders[1:-1, 0] - borders[:-2, 0]).max()) == 3


def test_no_rows_with_tokens() -> None:
    borders = decode_borders(torch.zeros(3, dtype=torch.int64), None, 2, KEYS, 0, 5)
    assert not borders[:, 0].any() and not borders[:, 2].any()


@pytest.mark.parametrize(
    ("dtype", "size", "keys"),
    [(torch.float32, 64, 32), (torch.bfloat16, 128, 64), (torch.float16, 256, 32), (torch.bfloat16, 64, 64)],
)
def test_keys_of_a_unit_fit_the_shared_memory(dtype: torch.dtype, size: int, keys: int) -> None:
    assert keys_of_unit(dtype, size) == keys
    assert 2 * keys * size * dtype.itemsize <= 32 << 10
