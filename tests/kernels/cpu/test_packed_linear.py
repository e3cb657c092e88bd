"""Is the product with a packed matrix right, and a token's the same to the bit in any company?"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from slipstream.kernels.cpu.instruction_sets import usable_sets
from slipstream.kernels.cpu.library import LibraryUnavailable, instruction_set, library
from slipstream.kernels.cpu.packed_matrix import SOURCES, Kind, PackedMatrix, linear
from slipstream.kernels.cpu.packed_reference import error_bound, linear_reference, quantize_reference
from tests.kernels.cpu.stored_weights import (
    PACKINGS,
    block_columns,
    needs_library,
    packed,
    random_activations,
)


def usable_names() -> list[str]:
    try:
        return [instructions.name for instructions in usable_sets()]
    except LibraryUnavailable:
        return ["none"]


@pytest.fixture(autouse=True, params=usable_names())
def _instructions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run every test with each instruction set that this CPU has."""
    monkeypatch.setenv("SLIPSTREAM_CPU_INSTRUCTIONS", request.param)
    needs_library()
    assert instruction_set() == request.param
    library().ss_set_threads(2)
    yield
    library().ss_set_threads(1)


def shapes_for(source: str) -> list[tuple[int, int]]:
    """Rows of 1 to 3 tiles, ragged where the type allows it, and columns from one group to 2048."""
    if source.endswith("_K"):
        return [(48, 256), (7, 512), (33, 2048)]
    columns = (32, 96, 576, 2048) if block_columns(source) == 32 else (5, 33, 576, 2048)
    return list(zip((16, 48, 33, 1), columns, strict=True))


def assert_within_bound(y: Tensor, x: Tensor, matrix: PackedMatrix) -> None:
    error = (y.double() - linear_reference(x, matrix)).abs()
    bound = error_bound(x, matrix)
    assert (error <= bound).all(), f"{(error / bound).max():.3g} of the bound"


@pytest.mark.parametrize(("source", "kind"), PACKINGS)
@pytest.mark.parametrize("tokens", [1, 2, 3, 5, 6, 8, 13, 33])
def test_product_is_that_of_the_definition(source: str, kind: Kind, tokens: int) -> None:
    for rows, cols in shapes_for(source):
        matrix = packed(source, kind, rows, cols)
        x = random_activations(tokens, cols)
        assert_within_bound(linear(x, matrix), x, matrix)


@pytest.mark.slow
@pytest.mark.parametrize(("source", "kind"), PACKINGS)
def test_product_of_many_tokens(source: str, kind: Kind) -> None:
    for rows, cols in shapes_for(source):
        matrix = packed(source, kind, rows, cols)
        for tokens in (*range(1, 34), 512):
            x = random_activations(tokens, cols)
            for first in range(0, tokens, 64):
                part = x[first : first + 64]
                assert_within_bound(linear(x, matrix)[first : first + 64], part, matrix)


@pytest.mark.parametrize(("source", "kind"), PACKINGS)
def test_a_token_is_the_same_to_the_bit_in_any_batch(source: str, kind: Kind) -> None:
    rows, cols = 33, 512
    matrix = packed(source, kind, rows, cols)
    x = random_activations(33, cols)
    alone = torch.cat([linear(x[t : t + 1], matrix) for t in range(33)])
    for tokens in range(2, 34):
        for first in (0, 33 - tokens):
            given = linear(x[first : first + tokens], matrix)
            assert torch.equal(given, alone[first : first + tokens]), f"{tokens} tokens from {first}"


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_threads_change_no_bit(threads: int) -> None:
    matrix = packed("Q4_1", Kind.Q4_MIN, 100, 576)
    x = random_activations(7, 576)
    expected = linear(x, matrix)
    library().ss_set_threads(threads)
    assert torch.equal(linear(x, matrix), expected)


@pytest.mark.parametrize(("source", "kind"), PACKINGS)
def test_extreme_codes_do_not_overflow(source: str, kind: Kind) -> None:
    """All products of a group at their largest: sums of 16 bits would show it."""
    rows, cols = 16, 512
    matrix = packed(source, kind, rows, cols)
    codes = matrix.data[: 16 * cols] if kind >= Kind.Q8_GROUP else matrix.data
    if kind >= Kind.Q4_SYM:
        per_group = {4: 256, 5: 320, 6: 384, 8: 512}[int(kind.name[1])]
        codes = matrix.data[: cols // 32 * per_group]
        codes.fill_(128 if kind >= Kind.Q8_GROUP else 255)
    for x in (torch.ones(8, cols), -torch.ones(8, cols)):
        assert_within_bound(linear(x, matrix), x, matrix)


def test_bias_is_added() -> None:
    for rows in (16, 33):
        matrix = packed("Q8_0", Kind.Q8_GROUP, rows, 64)
        x, bias = random_activations(9, 64), torch.linspace(-3, 3, rows)
        assert torch.equal(linear_with_bias(x, matrix, bias), linear(x, matrix) + bias)


def linear_with_bias(x: Tensor, matrix: PackedMatrix, bias: Tensor) -> Tensor:
    native, tokens = library(), len(x)
    y = torch.empty(tokens, matrix.rows)
    scratch = torch.empty(native.ss_linear_scratch_bytes(matrix.kind, matrix.cols, tokens), dtype=torch.uint8)
    native.ss_linear(matrix.address, x.data_ptr(), y.data_ptr(), tokens, bias.data_ptr(), scratch.data_ptr())
    return y


def test_no_tokens_are_no_rows() -> None:
    matrix = packed("Q8_0", Kind.Q8_GROUP, 16, 64)
    assert linear(torch.empty(0, 64), matrix).shape == (0, 16)


@pytest.mark.parametrize(("source", "kind"), PACKINGS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_damage_stays_in_its_token(source: str, kind: Kind, value: float) -> None:
    cols = 512
    matrix = packed(source, kind, 33, cols)
    x = random_activations(9, cols)
    expected = linear(x, matrix)
    x[4, 77] = value
    given = linear(x, matrix)
    assert not given[4].isfinite().any()
    others = [0, 1, 2, 3, 5, 6, 7, 8]
    assert torch.equal(given[others], expected[others])


def identity(cols: int) -> PackedMatrix:
    matrix = PackedMatrix.empty(Kind.Q8_ROW, rows=cols, cols=cols)
    assert matrix.pack(torch.eye(cols) * 127, "F32")
    return matrix


def test_activations_round_to_the_nearest_even_code() -> None:
    cols = 64
    x = torch.zeros(2, cols)
    x[0, :6] = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -126.5])
    x[1, 32:36] = torch.tensor([-254.0, 1.0, 3.0, 5.0])
    codes = quantize_reference(x).codes.flatten(1)
    assert codes[0, :6].tolist() == [127, 0, 2, 2, 0, -126]
    assert codes[1, 32:36].tolist() == [-127, 0, 2, 2]
    scales = quantize_reference(x).scales.repeat_interleave(32, dim=1)
    # 127 x code x scale, of which 127 x code is exact: one rounding.
    expected = 127.0 * codes.float() * scales
    assert torch.equal(linear(x, identity(cols)), expected)


def test_activations_beyond_the_range_of_a_scale() -> None:
    x = torch.zeros(4, 32)
    x[0, 3], x[1, 3], x[2, 3] = 1e36, 1e-37, -1e-30
    y = linear(x, identity(32))
    # The largest of a group keeps its value but for the roundings of 1/127 and of two products; what has no
    # finite inverse is zero.
    expected = torch.zeros(4, 32)
    expected[0, 3], expected[2, 3] = 1.27e38, -1.27e-28
    torch.testing.assert_close(y, expected, rtol=4 * 2.0**-24, atol=0)


def test_the_comparison_sees_one_wrong_code() -> None:
    matrix = packed("Q4_0", SOURCES["Q4_0"][1] or Kind.F32, 16, 512)
    x = random_activations(3, 512)
    y = linear(x, matrix)
    matrix.data[5] ^= 1
    with pytest.raises(AssertionError, match="of the bound"):
        assert_within_bound(y, x, matrix)


def argmax(x: Tensor) -> list[int]:
    best = torch.empty(x.shape[0], dtype=torch.int64)
    library().ss_argmax(ctypes.c_void_p(x.data_ptr()), *x.shape, ctypes.c_void_p(best.data_ptr()))
    return best.tolist()


@pytest.mark.parametrize("cols", [1, 15, 16, 17, 1000])
def test_argmax_is_the_first_of_the_greatest(cols: int) -> None:
    x = torch.randint(-5, 5, (40, cols), generator=torch.Generator().manual_seed(cols)).float()
    assert argmax(x) == [int((row == row.max()).nonzero()[0]) for row in x]


def test_argmax_of_infinities_and_nan() -> None:
    inf, nan = float("inf"), float("nan")
    x = torch.zeros(6, 40)
    x[0, 7], x[0, 9] = inf, inf
    x[1] = -inf
    x[2, 39] = nan
    x[3, 2] = nan
    x[4], x[4, 30] = -inf, -3.0
    x[5, :20] = -inf
    assert argmax(x) == [7, 0, -1, -1, 30, 20]
