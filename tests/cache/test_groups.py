"""Do all groups of a model get equal pages, every layer exactly one place, and bad input a sentence?"""

from __future__ import annotations

import pytest

from slipstream.cache.groups import resolve
from slipstream.core.cache_group import CacheGroup
from slipstream.core.errors import ConfigError, UnsupportedError


def declare(*counts: int, heads: int = 1, head_dim: int = 256) -> list[CacheGroup]:
    """Layers in turn: the first count is of a window kind where there are two."""
    first = 0
    groups: list[CacheGroup] = []
    for idx, count in enumerate(counts):
        is_window = len(counts) > 1 and idx == 0
        groups.append(
            CacheGroup(
                layers=tuple(range(first, first + count)),
                kind="window" if is_window else "full",
                window=512 if is_window else 0,
                heads=heads,
                head_dim=head_dim,
            )
        )
        first += count
    return groups


@pytest.mark.parametrize(
    ("counts", "sizes"),
    [
        ((30,), [30]),  # one kind: one group
        ((15, 3), [3] * 6),  # five window groups and a full one
        ((16, 16), [16, 16]),
        ((29, 10), [10, 10, 9, 10]),  # one unused place in 40
        ((7, 3), [1] * 10),  # any larger group would waste more than a tenth
    ],
)
def test_kinds_are_split_into_groups_of_equal_size(counts: tuple[int, ...], sizes: list[int]) -> None:
    groups = resolve(declare(*counts), block_tokens=32, element_bytes=2)
    assert [len(group.layers) for group in groups] == sizes
    assert sorted(layer for group in groups for layer in group.layers) == list(range(sum(counts)))
    # Pages hold the largest group: layers x (K and V) x tokens x heads x head_dim x bytes.
    assert {group.page_bytes for group in groups} == {max(sizes) * 2 * 32 * 1 * 256 * 2}
    assert {group.block_tokens for group in groups} == {group.match_granularity for group in groups} == {32}
    assert {group.window for group in groups if group.kind == "window"} <= {512}


@pytest.mark.parametrize("block_tokens", [0, 4, 12, 33, 256])
def test_block_sizes_out_of_bounds_are_refused(block_tokens: int) -> None:
    with pytest.raises(ConfigError, match=rf"tokens_per_block is {block_tokens}; it must be a power of two"):
        resolve(declare(4), block_tokens=block_tokens, element_bytes=2)


def test_kinds_that_are_not_served_are_refused_by_name() -> None:
    group = CacheGroup(layers=(0,), kind="latent", heads=1, head_dim=64)
    with pytest.raises(UnsupportedError, match=r"'latent' are not served .* served: full, window"):
        resolve([group], block_tokens=32, element_bytes=2)


def test_different_head_shapes_cannot_share_a_pool() -> None:
    declared = [*declare(4), *declare(4, heads=2)]
    with pytest.raises(UnsupportedError, match=r"\[\(1, 256\), \(2, 256\)\] cannot share one page pool"):
        resolve(declared, block_tokens=32, element_bytes=2)
