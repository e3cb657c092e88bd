"""Do two blocks share a key only if all that their K and V depend on is the same?"""

from __future__ import annotations

import itertools

import pytest

from slipstream.cache.keys import block_key, extend_keys, root_key


def test_roots_differ_by_salt_adapter_and_media() -> None:
    roots = [
        root_key(),
        root_key(salt="a"),
        root_key(salt="b"),
        root_key(salt=""),
        root_key(adapter="a"),
        root_key(adapter="b"),
        root_key(salt="a", adapter="a"),
        root_key(media=["a"]),
        root_key(media=["a", "b"]),
        root_key(media=["b", "a"]),
        root_key(media=["30x100:ff"]),
        root_key(media=["100x30:ff"]),
    ]
    assert len(set(roots)) == len(roots)
    assert all(len(root) == 32 for root in roots)
    assert root_key(salt="a") == root_key(salt="a")


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ({"salt": "ab", "adapter": "c"}, {"salt": "a", "adapter": "bc"}),
        ({"salt": "ab"}, {"salt": "a", "media": ["b"]}),
        ({"media": ["ab"]}, {"media": ["a", "b"]}),
        ({"media": ["", "a"]}, {"media": ["a", ""]}),
        ({"salt": None, "adapter": "x"}, {"salt": "x", "adapter": None}),
    ],
)
def test_fields_cannot_run_together(left: dict[str, str], right: dict[str, str]) -> None:
    assert root_key(**left) != root_key(**right)  # type: ignore[arg-type]


def test_keys_depend_on_every_token_and_on_all_before() -> None:
    blocks = [(1, 2, 3), (1, 2, 4), (2, 1, 3), (1, 2), (1, 2, 3, 0), (1 << 8, 2, 3), (1 << 16, 2, 3)]
    parents = [root_key(), root_key(salt="a"), block_key(root_key(), (1, 2, 3))]
    found = {block_key(parent, tokens) for parent, tokens in itertools.product(parents, blocks)}
    assert len(found) == len(parents) * len(blocks)
    assert all(len(key) == 32 for key in found)


def test_extend_keys_adds_full_blocks_only_and_goes_on_where_it_stopped() -> None:
    tokens = list(range(50))
    at_once: list[bytes] = []
    extend_keys(at_once, root_key(), tokens, 8)
    assert len(at_once) == 6
    grown: list[bytes] = []
    for known in range(51):
        extend_keys(grown, root_key(), tokens[:known], 8)
        assert len(grown) == known // 8
    assert grown == at_once
    assert at_once[1] == block_key(block_key(root_key(), tokens[:8]), tokens[8:16])
