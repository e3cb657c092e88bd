"""Does a product through deep queues compute what it should, in bits that depend on neither tile nor tokens?

numpy, in which triton interprets, adds up the lines of a tile in several ways; whole numbers that every order
adds up exactly leave it no choice, so bits are compared there too. A GPU compares them on random numbers, in
every tile that can be chosen.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from slipstream.kernels.fixed_linear import fixed_linear_op
from tests.kernels.gpu.conftest import HAS_GPU, has_interpreter

if not (HAS_GPU or has_interpreter()):
    pytest.skip("no GPU, and no triton >= 3.7 to interpret kernels", allow_module_level=True)

from slipstream.kernels.gpu.queued_matmul import Tile, is_aligned, queued_matmul
from slipstream.kernels.gpu.queued_tiles import (
    GATED_RULE,
    MIN_TILES,
    RULE,
    SIZES,
    TILES,
    can_queue,
    rule_of,
    tile_of,
)

SILU = 0
# float16 keeps 11 bits: half a unit of the result, beside sums of float32.
TOLERANCE = 2e-3
# The matrix unit of a GPU takes 64 rows; numpy takes any.
LEAST = 64 if HAS_GPU else 16
CUTS = [
    Tile(LEAST, 32, 32, 2, 4),
    Tile(LEAST, 16, 64, 3, 4, ahead=2),
    Tile(16, LEAST, 32, 2, 4, weights_first=True, ahead=2),
    Tile(LEAST, LEAST, 32, 2, 4, group=2, in_turn=True),
    Tile(2 * LEAST, 32, 64, 3, 4, group=1, in_turn=True),
]
MAX_SHARED = 227 * 1024


def draw(*shape: int, seed: int, device: str, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def whole(*shape: int, seed: int, device: str) -> Tensor:
    numbers = torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(seed))
    return numbers.to(device, torch.float16)


@pytest.mark.parametrize("tile", CUTS, ids=str)
@pytest.mark.parametrize("inputs", [96, 160])
def test_a_product_and_what_stands_behind_it(device: str, inputs: int, tile: Tile) -> None:
    tokens, outputs = 37, 144
    x = draw(tokens, inputs, seed=0, device=device)
    weight = (draw(outputs, inputs, seed=1, device=device, dtype=torch.float32) * inputs**-0.5).half()
    residual = draw(tokens, outputs, seed=2, device=device)
    exact = x.double() @ weight.double().T
    gate, up = exact.chunk(2, -1)
    for given, expected in (
        (queued_matmul(x, weight, tile=tile), exact),
        (queued_matmul(x, weight, tile=tile, residual_TO=residual), exact + residual.double()),
        (queued_matmul(x, weight, tile=tile, activation=SILU), silu(gate) * up),
    ):
        torch.testing.assert_close(given.double(), expected, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("tile", CUTS, ids=str)
def test_whole_numbers_are_the_same_bits_in_any_tile_and_step(device: str, tile: Tile) -> None:
    x, weight = whole(70, 160, seed=0, device=device), whole(80, 160, seed=1, device=device)
    expected = x.double() @ weight.double().T
    assert float(expected.abs().max()) < 2048, "exact in float16"
    for first, last in ((0, 70), (0, 1), (69, 70), (3, 20), (16, 49)):
        given = queued_matmul(x[first:last], weight, tile=tile)
        assert torch.equal(given.double(), expected[first:last])
    assert queued_matmul(x[:0], weight, tile=tile).shape == (0, 80)


def test_tokens_that_cannot_be_fetched_are_copied(device: str) -> None:
    weight = whole(80, 96, seed=1, device=device)
    flat = whole(20, 4 * 96, seed=0, device=device)
    for x in (flat[:, 3:99], flat[:, 96:192], flat[:, ::4], flat[:1, :96].expand(5, 96)):
        given = queued_matmul(x, weight, tile=CUTS[0])
        assert torch.equal(given.double(), x.double() @ weight.double().T)
    assert not is_aligned(flat[:, 3:99]) and not is_aligned(flat[:, ::4]) and is_aligned(flat[1:, 96:192])


def test_which_matrices_are_met_so_does_not_depend_on_tokens(device: str) -> None:
    weight = whole(80, 96, seed=1, device=device)
    on_hopper = HAS_GPU and torch.cuda.get_device_capability() == (9, 0)
    assert can_queue(weight) == on_hopper
    assert not can_queue(weight.float()) and not can_queue(weight[:, :64]) and not can_queue(weight[:, 1:])
    assert not can_queue(whole(80, 92, seed=1, device=device))


@pytest.mark.parametrize("is_gated", [False, True])
def test_the_rule_keeps_multiprocessors_at_work(is_gated: bool) -> None:
    rule = GATED_RULE if is_gated else RULE
    for outputs in (1024, 4096, 6144, 14336, 128256):
        widths = [rule_of(tokens, outputs, is_gated=is_gated) for tokens in (1, 64, 65, 256, 2048, 8192)]
        assert widths[0] == widths[1], "bits aside, a step of a few rows is one kernel"
        areas = [tile.tokens * tile.outputs for tile in widths]
        assert areas == sorted(areas)
        for tokens, tile in zip((1, 64, 65, 256, 2048, 8192), widths, strict=True):
            enough = -(-tokens // tile.tokens) * -(-outputs // tile.outputs) >= MIN_TILES
            assert enough or tile == rule[-1]
    assert rule_of(8192, 28672, is_gated=is_gated) == rule[0]


def test_every_tile_fits_and_gives_tokens_the_rows_of_the_matrix_unit() -> None:
    rows = [*((False, tile) for tile in RULE), *((True, tile) for tile in GATED_RULE)]
    rows += [(is_gated, tile) for (_, _, is_gated, _), tile in TILES.items()]
    for is_gated, tile in rows:
        fetched = tile.tokens + tile.outputs * (2 if is_gated else 1)
        assert 2 * tile.stages * tile.inputs * fetched < MAX_SHARED, tile
        assert tile.tokens % 64 == 0 and not tile.weights_first, tile
    assert {tokens for _, _, _, tokens in TILES} <= set(SIZES)


def test_a_table_row_goes_before_the_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.empty(6144, 4096, dtype=torch.bfloat16, device="meta")
    mine = Tile(64, 128, 64, 3, 4)
    monkeypatch.setitem(TILES, (6144, 4096, False, 64), mine)
    assert tile_of(17, weight, is_gated=False) == tile_of(64, weight, is_gated=False) == mine
    assert tile_of(65, weight, is_gated=False) != mine
    assert tile_of(64, weight, is_gated=True) == rule_of(64, 3072, is_gated=True)


# Every layer of Llama-3.1-8B, two of Qwen3-0.6B, and one that blocks do not divide: rows, inputs, is gated.
MATRICES = [
    (6144, 4096, False),
    (4096, 4096, False),
    (28672, 4096, True),
    (4096, 14336, False),
    (6144, 1024, True),
    (1024, 3072, False),
    (1000, 1048, False),
]
COUNTS = (1, 2, 16, 17, 63, 64, 65, 128, 200, 256, 300, 512, 1000, 2048, 8192)


@pytest.mark.skipif(not HAS_GPU, reason="bits of random numbers are a GPU's business")
@pytest.mark.parametrize(("rows", "inputs", "is_gated"), MATRICES)
def test_every_tile_that_can_be_chosen_gives_the_bits_of_a_token_alone(
    device: str, rows: int, inputs: int, is_gated: bool
) -> None:
    dtype = torch.bfloat16
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(COUNTS[-1], inputs, generator=generator, device=device).to(dtype)
    weight = (torch.randn(rows, inputs, generator=generator, device=device) * inputs**-0.5).to(dtype)
    kind, name = (SILU, "silu") if is_gated else (-1, "")
    alone = tile_of(1, weight, is_gated=is_gated)
    # Tokens of the same tile do not meet: 64 at once, then some of them on their own.
    expected = torch.cat([queued_matmul(t, weight, tile=alone, activation=kind) for t in x.split(64)])
    for token in (0, 63, 64, 2047, 8191):
        one = queued_matmul(x[token : token + 1], weight, tile=alone, activation=kind)
        assert torch.equal(one[0], expected[token])
    for count in COUNTS:
        assert torch.equal(fixed_linear_op(x[:count], weight, name), expected[:count]), count
        assert torch.equal(fixed_linear_op(x[-count:], weight, name), expected[-count:]), count
    rule = GATED_RULE if is_gated else RULE
    for tile in rule:
        assert torch.equal(queued_matmul(x, weight, tile=tile, activation=kind), expected), tile
    exact = x[:64].double() @ weight.double().T
    if is_gated:
        gate, up = exact.chunk(2, -1)
        exact = silu(gate) * up
    # bfloat16 keeps 8 bits.
    torch.testing.assert_close(expected[:64].double(), exact, rtol=2**-8, atol=2**-8)


@pytest.mark.skipif(not HAS_GPU, reason="bits of random numbers are a GPU's business")
@pytest.mark.parametrize("tile", RULE, ids=str)
def test_a_residual_leaves_the_bits_of_a_token_alone(device: str, tile: Tile) -> None:
    x, weight = (
        draw(*shape, seed=i, device=device, dtype=torch.bfloat16)
        for i, shape in enumerate(((777, 1048), (1000, 1048)))
    )
    residual = draw(777, 1000, seed=2, device=device, dtype=torch.bfloat16)
    expected = queued_matmul(x, weight, tile=tile, residual_TO=residual)
    other = queued_matmul(x, weight, tile=rule_of(1, 1000, is_gated=False), residual_TO=residual)
    assert torch.equal(other, expected)
    for token in (0, 63, 64, 500, 776):
        here = slice(token, token + 1)
        assert torch.equal(
            queued_matmul(x[here], weight, tile=tile, residual_TO=residual[here]), expected[here]
        )
