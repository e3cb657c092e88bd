"""Do trees of drafts get from the GPU's kernel what dense attention over each path gives, in float64?

Run on a GPU or interpreted; shares are made small, so that some hundred keys make several, and on a GPU real
shapes run as well.
"""

from __future__ import annotations

import pytest
import torch

from tests.kernels.gpu.conftest import HAS_GPU, has_interpreter
from tests.kernels.tree_steps import Parents, Row, TreeStep, chain, random_tree, star

if HAS_GPU or has_interpreter():
    from slipstream.kernels.gpu import paged_prefill as file

# As in `test_paged_attention.py`.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
# Beside trees: a row of one token, which no tile names, and an ordinary span.
MIXED = (
    Row(1, 9),
    Row(5, 21),
    Row(7, 130, random_tree(7, seed=1), bad=(2,)),
    Row(40, 101, random_tree(40, seed=2, roots=2), bad=(5, 39)),
)
# Behind nothing, a tile and a token, and every bit in use.
EDGES = (
    Row(2, 2, star(2)),
    Row(3, 68, chain(3)),
    Row(33, 33, star(33)),
    Row(64, 140, random_tree(64, seed=5)),
)


def small_cut(**changes: int) -> object:
    return file.Cut(
        **{"lines": 32, "keys": 32, "warps": 4, "stages": 2, "per_sm": 400, "shortest": 32} | changes
    )


def check(step: TreeStep, cut: object = None, *, is_cut: bool = True) -> None:
    given = step.run(file.paged_prefill, is_cut=is_cut, cut=cut).double()
    torch.testing.assert_close(given, step.expected(), rtol=0, atol=TOLERANCE[step.dtype], equal_nan=True)
    assert not step.counters.any()


@pytest.mark.parametrize(
    ("rows", "heads", "kv_heads", "size"), [(MIXED, 4, 1, 64), (EDGES, 2, 2, 24)], ids=["mixed", "edges"]
)
def test_paths_are_seen_and_nothing_else(
    device: str, rows: tuple[Row, ...], heads: int, kv_heads: int, size: int
) -> None:
    check(TreeStep(rows, heads, kv_heads, size, device=device), small_cut())


@pytest.mark.parametrize(("window", "rows"), [(1, EDGES), (5, MIXED), (40, EDGES), (100, MIXED)])
def test_a_window_counts_in_depths(device: str, window: int, rows: tuple[Row, ...]) -> None:
    check(TreeStep(rows, 1, 1, 16, window=window, device=device), small_cut())


@pytest.mark.parametrize("page", [8, 64])
def test_pages_and_soft_caps(device: str, page: int) -> None:
    window = 9 if page == 8 else 0
    check(TreeStep(MIXED, 1, 1, 16, page=page, softcap=3.0, window=window, device=device), small_cut())


@pytest.mark.parametrize("dtype", [torch.float16] + ([torch.bfloat16] if HAS_GPU else []), ids=str)
def test_narrow_types(device: str, dtype: torch.dtype) -> None:
    check(TreeStep(MIXED, 2, 1, 32, dtype=dtype, device=device), small_cut(lines=64, keys=64))


def test_whole_contexts_and_walks_of_one_shape(device: str) -> None:
    """Without counters nothing is shared out, and every tile of keys is masked."""
    check(TreeStep(MIXED, 1, 1, 16, device=device))
    check(TreeStep(MIXED, 1, 1, 16, device=device), is_cut=False)
    check(TreeStep(MIXED, 1, 1, 16, window=20, device=device), is_cut=False)


@pytest.mark.parametrize("parents", [chain(9), random_tree(30, seed=8)], ids=["chain", "tree"])
def test_any_draft_may_be_nan(device: str, parents: Parents) -> None:
    for bad in range(0, len(parents), 7):
        rows = (Row(len(parents), 60, parents, bad=(bad,)),)
        check(TreeStep(rows, 1, 1, 16, device=device, seed=bad), small_cut())


def test_a_chain_is_an_ordinary_span(device: str) -> None:
    for window in (0, 11):
        rows = [(Row(20, 90, parents),) for parents in (chain(20), None)]
        given, plain = (
            TreeStep(row, 2, 1, 16, window=window, device=device).run(file.paged_prefill, cut=small_cut())
            for row in rows
        )
        # Tiles of keys are masked here and not there: sums of another order.
        torch.testing.assert_close(given, plain, rtol=0, atol=1e-5)


def test_a_late_tile_may_look_as_far_as_the_first(device: str) -> None:
    """In float32 a tree of 64 is two tiles, and tokens of both follow the first one."""
    step = TreeStep((Row(64, 300, star(64)),), 1, 1, 16, window=34, device=device)
    check(step, small_cut(keys=16, shortest=16))


def test_bits_are_counted_at_both_ends() -> None:
    """Windows need how deep a token stands: 64 of a chain count to 64."""
    step = TreeStep((Row(64, 64, chain(64)),), 1, 1, 16, window=2, device="cuda" if HAS_GPU else "cpu")
    check(step, small_cut())


@pytest.mark.skipif(not HAS_GPU, reason="needs a GPU: interpreted, it takes minutes")
@pytest.mark.parametrize("window", [0, 24, 1000])
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(32, 8, 128), (16, 8, 128), (4, 1, 256)])
def test_real_shapes(device: str, heads: int, kv_heads: int, size: int, window: int) -> None:
    shapes = [[(64, 4160)], [(8, 8192)], [(17, 3000), (33, 40), (64, 9000)], [(16, 2048)] * 32]
    for shape in shapes:
        rows = tuple(
            Row(count, length, random_tree(count, seed=i), bad=(count - 1,))
            for i, (count, length) in enumerate(shape)
        )
        step = TreeStep(rows, heads, kv_heads, size, window=window, dtype=torch.bfloat16, device=device)
        check(step)
        given, again = (step.run(file.paged_prefill) for _ in range(2))
        torch.testing.assert_close(given, again, rtol=0, atol=0, equal_nan=True)
