"""Does packing keep what a checkpoint stores, and say what it cannot keep?"""

from __future__ import annotations

import pytest
import torch

from slipstream.core.errors import UnsupportedError
from slipstream.kernels.cpu.packed_matrix import SOURCES, Kind, PackedMatrix, embedding
from slipstream.kernels.cpu.packed_reference import unpack
from tests.kernels.cpu.stored_weights import (
    PACKINGS,
    QUANTIZED_SOURCES,
    float_values,
    needs_library,
    packed,
    stored_rows,
)

EXACT = [(source, kind) for source, kind in PACKINGS if not source.endswith("_K") and kind < Kind.Q8_ROW]
EXACT.remove(("F32", Kind.Q8_GROUP))
ROWS = (1, 16, 40)
# Half floats keep 11 bits, and below 2^-14 a fixed step of 2^-24: half of it is the error.
HALF_ROUNDING, HALF_STEP = 2.0**-11, 2.0**-25


@pytest.fixture(autouse=True)
def _library() -> None:
    needs_library()


def columns_for(source: str) -> tuple[int, ...]:
    if source.endswith("_K"):
        return (256, 768)
    return (32, 160) if source in QUANTIZED_SOURCES else (1, 33, 100, 288)


@pytest.mark.parametrize(("source", "kind"), EXACT)
@pytest.mark.parametrize("rows", ROWS)
def test_codes_and_scales_are_kept(source: str, kind: Kind, rows: int) -> None:
    for cols in columns_for(source):
        stored = stored_rows(source, rows, cols)
        matrix = packed(source, kind, rows, cols)
        torch.testing.assert_close(unpack(matrix), float_values(source, stored), rtol=0, atol=0)


@pytest.mark.parametrize("source", ["Q4_K", "Q5_K", "Q6_K"])
@pytest.mark.parametrize("rows", ROWS)
def test_products_of_two_level_scales_are_rounded_once(source: str, rows: int) -> None:
    kind = SOURCES[source][1]
    assert kind is not None
    for cols in columns_for(source):
        values = float_values(source, stored_rows(source, rows, cols))
        error = (unpack(packed(source, kind, rows, cols)) - values).abs()
        # scale x code and minimum are each off by their rounding. They may cancel, so the bound follows their
        # sizes: at most 63 x 63 x 0.02 = 80 of scale and 1.3 of minimum; 127 x 32 x 0.02 for Q6_K.
        largest = {"Q4_K": 63 * 15 * 0.02, "Q5_K": 63 * 31 * 0.02, "Q6_K": 128 * 32 * 0.02}[source]
        bound = HALF_ROUNDING * (largest + 63 * 0.02) + 64 * HALF_STEP
        assert error.max() <= bound
        # Rounding is that small for the typical weight too, and something is rounded.
        assert 0 < error.mean() <= HALF_ROUNDING * (values.abs().mean() + 63 * 0.02)


@pytest.mark.parametrize("kind", [Kind.Q8_ROW, Kind.Q8_GROUP])
def test_floats_become_the_nearest_codes(kind: Kind) -> None:
    rows, cols = 40, 100
    values = float_values("F32", stored_rows("F32", rows, cols))
    weights = unpack(packed("F32", kind, rows, cols))
    padded = torch.nn.functional.pad(values, (0, 28)).view(rows, -1, 32)
    largest = padded.abs().amax(-1).amax(-1)[:, None] if kind is Kind.Q8_ROW else padded.abs().amax(-1)
    steps = largest / 127 if kind is Kind.Q8_ROW else (largest / 127).half().float()
    steps = steps.repeat_interleave(1 if kind is Kind.Q8_GROUP else 4, dim=1).repeat_interleave(32, dim=1)
    # Half a step, and for the largest weight what rounding its scale to a half float moves 127 steps by.
    bound = steps[:, :cols] * (0.5 + 127 * HALF_ROUNDING)
    assert ((weights - values).abs() <= bound).all()


@pytest.mark.parametrize(("source", "kind"), PACKINGS)
def test_runs_of_tiles_make_the_same_matrix(source: str, kind: Kind) -> None:
    rows, cols = 50, columns_for(source)[-1]
    stored = stored_rows(source, rows, cols)
    at_once = packed(source, kind, rows, cols)
    in_runs = PackedMatrix.empty(kind, rows=rows, cols=cols)
    for start, stop in ((32, 50), (0, 32)):
        assert in_runs.pack(stored[start:stop], source, first_row=start)
    assert torch.equal(in_runs.data, at_once.data)


@pytest.mark.parametrize(("source", "kind"), PACKINGS)
def test_embedding_reads_rows_of_the_packed_form(source: str, kind: Kind) -> None:
    rows, cols = 40, columns_for(source)[-1]
    matrix = packed(source, kind, rows, cols)
    ids = torch.tensor([39, 0, 16, 16, 15, 3])
    expected = unpack(matrix)[ids]
    torch.testing.assert_close(embedding(matrix, ids), expected, rtol=0, atol=0)
    torch.testing.assert_close(embedding(matrix, ids, 1.7), expected * 1.7, rtol=0, atol=0)


@pytest.mark.parametrize("bad_id", [-1, 40, 2**40])
def test_an_id_that_is_no_row_is_refused(bad_id: int) -> None:
    matrix = packed("Q8_0", Kind.Q8_GROUP, 40, 32)
    with pytest.raises(IndexError, match="40 rows"):
        embedding(matrix, torch.tensor([0, bad_id]))


@pytest.mark.parametrize("source", QUANTIZED_SOURCES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_scale_that_is_not_finite_is_reported(source: str, value: float) -> None:
    kind = SOURCES[source][1]
    assert kind is not None
    cols = columns_for(source)[-1]
    stored = stored_rows(source, 40, cols)
    place = 208 if source == "Q6_K" else 0
    stored[33, place : place + 2] = torch.tensor([value], dtype=torch.float16).view(torch.uint8)
    matrix = PackedMatrix.empty(kind, rows=40, cols=cols)
    assert not matrix.pack(stored, source)
    assert matrix.pack(stored[:32], source)


@pytest.mark.parametrize("kind", [Kind.F32, Kind.Q8_ROW, Kind.Q8_GROUP])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite_is_reported(kind: Kind, value: float) -> None:
    weights = torch.ones(20, 40)
    weights[17, 35] = value
    assert not PackedMatrix.empty(kind, rows=20, cols=40).pack(weights, "F32")


@pytest.mark.parametrize(
    ("source", "kind", "cols", "reason"),
    [
        ("Q4_0", Kind.Q4_MIN, 256, "codes of its own stored types"),
        ("Q8_0", Kind.F32, 256, "codes of its own stored types"),
        ("F32", Kind.Q4_SYM, 256, "only 8-bit kinds are made from floats"),
        ("F16", Kind.BF16, 256, "only 8-bit kinds"),
        ("Q4_K", Kind.Q4_MIN, 288, "not whole blocks"),
        ("Q5_0", Kind.Q5_SYM, 33, "not whole blocks"),
    ],
)
def test_what_a_kind_cannot_keep_is_refused(source: str, kind: Kind, cols: int, reason: str) -> None:
    matrix = PackedMatrix.empty(kind, rows=16, cols=cols)
    with pytest.raises(UnsupportedError, match=reason):
        matrix.pack(torch.zeros(16, 4 * cols, dtype=torch.uint8), source)


def test_memory_is_aligned_and_as_large_as_the_layout_says() -> None:
    # Groups of 16 x 32: 256, 320 or 384 bytes of codes for 4, 5 and 6 bits, 32 or 64 of half floats.
    per_group = {Kind.Q4_SYM: 288, Kind.Q4_MIN: 320, Kind.Q5_SYM: 352, Kind.Q5_MIN: 384, Kind.Q6: 448}
    for kind, expected in per_group.items():
        matrix = PackedMatrix.empty(kind, rows=17, cols=64)
        assert matrix.num_bytes == 2 * 2 * expected
        assert matrix.data.data_ptr() % 64 == 0
