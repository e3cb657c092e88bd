"""Do a tree's bits say what its parents do, and does the definition of attention follow them?"""

from __future__ import annotations

import pytest
import torch

from slipstream.core.errors import EngineError
from slipstream.kernels.paged_prefill import paged_prefill, paged_prefill_op
from slipstream.kernels.tree_masks import MAX_TREE_TOKENS, require_tree, tree_of, visible_positions
from tests.kernels.tree_steps import Row, TreeStep, chain, path_of, random_tree, star

# As in `tests/kernels/gpu/test_few_queries.py`.
TOLERANCE = 2e-5
TREES = [chain(1), chain(64), star(9), (-1, -1, -1, 0, 2, 2), *(random_tree(n, seed=n) for n in (2, 33, 64))]


@pytest.mark.parametrize("parents", TREES, ids=lambda parents: str(len(parents)))
def test_bits_are_the_path_and_depths_its_length(parents: tuple[int, ...]) -> None:
    tree = tree_of(parents)
    for offset, (bits, depth) in enumerate(zip(tree.bits, tree.depths, strict=True)):
        path = path_of(parents, offset)
        assert [i for i in range(64) if bits >> i & 1] == path and depth == len(path) - 1
        assert -(2**63) <= bits < 2**63


@pytest.mark.parametrize(
    ("parents", "num_tokens", "match"),
    [
        ((-1, 0), 3, "row 4 has 3 tokens and 2 parents"),
        ((-1, 1), 2, r"row 4 .*parents\[1\]=1 is given; .* at most 0, or -1"),
        ((0,), 1, r"row 4 .*parents\[0\]=0"),
        ((-1, -2), 2, r"row 4 .*parents\[1\]=-2"),
        (chain(MAX_TREE_TOKENS + 1), MAX_TREE_TOKENS + 1, "65 tokens are given; at most 64"),
    ],
)
def test_what_is_no_tree_is_refused_by_name(parents: tuple[int, ...], num_tokens: int, match: str) -> None:
    with pytest.raises(EngineError, match=match):
        require_tree(parents, row=4, num_tokens=num_tokens)
    require_tree(chain(MAX_TREE_TOKENS), row=4, num_tokens=MAX_TREE_TOKENS)


@pytest.mark.parametrize("window", [0, 1, 3, 7, 40])
@pytest.mark.parametrize("start", [0, 5, 30])
def test_visible_positions_are_those_of_the_path_run_alone(start: int, window: int) -> None:
    for parents in TREES:
        row = Row(len(parents), start + len(parents), parents)
        bits = torch.tensor(tree_of(parents).bits)
        for first in {0, max(0, start - window + 1) if window else 0}:
            given = visible_positions(bits, first=first, length=row.length, window=window)
            found = [(line.nonzero().flatten() + first).tolist() for line in given]
            assert found == [row.visible(offset, window) for offset in range(row.count)]


ROWS = (
    Row(1, 20),
    Row(7, 50, random_tree(7, seed=1), bad=(3, 6)),
    Row(9, 9, star(9)),
    Row(5, 31),
    Row(64, 70, random_tree(64, seed=3, roots=3)),
)


@pytest.mark.parametrize("window", [0, 2, 20])
@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("page", [8, 64])
def test_the_definition_is_dense_attention_over_paths(window: int, softcap: float, page: int) -> None:
    step = TreeStep(ROWS, window=window, softcap=softcap, page=page)
    torch.testing.assert_close(
        step.run(paged_prefill).double(), step.expected(), rtol=0, atol=TOLERANCE, equal_nan=True
    )


def test_a_sibling_that_is_nan_reaches_its_descendants_alone() -> None:
    out = TreeStep((Row(5, 40, (-1, 0, 0, 1, 2), bad=(1,)),)).run(paged_prefill)
    assert out.isnan().flatten(1).all(1).tolist() == [False, True, False, True, False]
    assert out.isfinite().flatten(1).all(1).tolist() == [True, False, True, False, True]


def test_the_op_takes_bits_last() -> None:
    arguments = TreeStep(ROWS[1:3]).arguments()
    torch.library.opcheck(paged_prefill_op, tuple(arguments), test_utils=("test_schema", "test_faketensor"))
