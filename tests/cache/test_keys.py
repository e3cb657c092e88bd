"""Do two blocks share a key only if all that their K and V depend on is the same?"""

from __future__ import annotations

import itertools

import pytest

from slipstream.cache.keys import TOKEN_BYTES, block_key, chain_keys, content_of, root_key, tokens_of


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
    parents = [root_key(), root_key(salt="a"), block_key(root_key(), content_of((1, 2, 3)))]
    found = {block_key(parent, content_of(tokens)) for parent, tokens in itertools.product(parents, blocks)}
    assert len(found) == len(parents) * len(blocks)
    assert all(len(key) == 32 for key in found)


def test_a_chain_has_the_key_of_each_block_after_the_one_before() -> None:
    tokens = [*range(44), 2**31 - 1, 0, 5, 1 << 20]
    content = content_of(tokens)
    assert tokens_of(content) == tokens
    found = chain_keys(root_key(), content, 8 * TOKEN_BYTES)
    parent, one_by_one = root_key(), []
    for first in range(0, len(tokens), 8):
        parent = block_key(parent, content_of(tokens[first : first + 8]))
        one_by_one.append(parent)
    assert found == one_by_one and len(set(found)) == 6
    assert chain_keys(root_key(), b"", 8 * TOKEN_BYTES) == []
