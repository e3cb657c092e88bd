"""Does a parameter take exactly its share of a tensor, in chunks, and refuse a wrong one by name?"""

from __future__ import annotations

import pytest
import torch

from slipstream.checkpoint.base import WeightTensor
from slipstream.core.errors import CheckpointError
from slipstream.layers import parameter as parameter_file
from slipstream.layers.parameter import Parameter, Slot, even_slot, row_chunks


class Source:
    """A tensor to be read, and the ranges that were."""

    def __init__(self, tensor: torch.Tensor, *, dtype: str = "F32") -> None:
        self.ranges: list[tuple[int, int]] = []
        self.tensor = tensor
        self.weight = WeightTensor("some.weight", tuple(tensor.shape), dtype, tensor.nbytes, self.read)

    def read(self, start: int, stop: int) -> torch.Tensor:
        self.ranges.append((start, stop))
        return self.tensor[start:stop]


def make(shape: tuple[int, ...], dim: int | None = None, slots: dict[str, Slot] | None = None) -> Parameter:
    parameter = Parameter.create(shape, dtype=torch.float32, device="cpu", dim=dim, slots=slots)
    parameter.data.fill_(-1.0)
    return parameter


WHOLE = torch.arange(48.0).reshape(8, 6)


def test_it_is_frozen_and_whole_by_default() -> None:
    parameter = make((8, 6))
    assert not parameter.requires_grad
    parameter.place(Source(WHOLE).weight)
    assert torch.equal(parameter, WHOLE)


def test_rows_of_others_are_never_read() -> None:
    source = Source(WHOLE)
    parameter = make((4, 6), 0, {"": even_slot(8, rank=1, size=2)})
    parameter.place(source.weight)
    assert torch.equal(parameter, WHOLE[4:])
    assert source.ranges == [(4, 8)]


def test_columns_are_cut_from_whole_rows() -> None:
    parameter = make((8, 3), 1, {"": even_slot(6, rank=1, size=2)})
    parameter.place(Source(WHOLE).weight)
    assert torch.equal(parameter, WHOLE[:, 3:])


def test_fused_slots_lie_side_by_side() -> None:
    slots = {"gate": even_slot(8, rank=1, size=2), "up": even_slot(8, rank=1, size=2, offset=4)}
    parameter = make((8, 6), 0, slots)
    parameter.place(Source(WHOLE + 100).weight, "up")
    assert torch.equal(parameter, torch.cat((torch.full((4, 6), -1.0), WHOLE[4:] + 100)))
    parameter.place(Source(WHOLE).weight, "gate")
    assert torch.equal(parameter, torch.cat((WHOLE[4:], WHOLE[4:] + 100)))


def test_chunks_are_bounded_and_whole_multiples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parameter_file, "CHUNK_BYTES", 3 * 6 * 4)
    source = Source(WHOLE)
    make((8, 6)).place(source.weight)
    assert source.ranges == [(0, 3), (3, 6), (6, 8)]
    assert list(row_chunks(source.weight, 2, 6, 2)) == [(2, 4), (4, 6), (6, 8)]
    assert list(row_chunks(source.weight, 0, 8, 4)) == [(0, 4), (4, 8)]


def test_a_transform_sees_whole_multiples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parameter_file, "CHUNK_BYTES", 1)
    parameter = make((8, 6))
    parameter.place(Source(WHOLE).weight, transform=lambda rows: rows.flip(0), row_multiple=4)
    assert torch.equal(parameter, torch.cat((WHOLE[:4].flip(0), WHOLE[4:].flip(0))))


def test_values_are_converted_to_the_parameters_type() -> None:
    parameter = Parameter.create((8, 6), dtype=torch.bfloat16, device="cpu")
    parameter.place(Source(WHOLE.double()).weight)
    assert torch.equal(parameter, WHOLE.bfloat16())


@pytest.mark.parametrize("shape", [(8, 5), (7, 6), (8, 6, 1), (48,)])
def test_a_wrong_shape_names_tensor_given_and_expected(shape: tuple[int, ...]) -> None:
    source = Source(torch.zeros(shape))
    with pytest.raises(CheckpointError, match=r"some\.weight.*asks for \[8, 6\]"):
        make((4, 6), 0, {"": even_slot(8, rank=0, size=2)}).place(source.weight)
    assert source.ranges == []


@pytest.mark.parametrize(
    ("tensor", "dtype", "is_refused"),
    [
        (torch.zeros(4), "F32", True),
        (torch.zeros(4, 6), "Q4_1", True),
        (torch.zeros(4, 6), "F32", False),
    ],
    ids=["vector", "quantised", "plain-matrix"],
)
def test_values_that_are_not_finite(tensor: torch.Tensor, dtype: str, is_refused: bool) -> None:
    tensor[2] = float("nan")
    parameter = make(tuple(tensor.shape))
    if is_refused:
        with pytest.raises(CheckpointError, match=r"some\.weight.*row 2"):
            parameter.place(Source(tensor, dtype=dtype).weight)
    else:
        # A pass over every plain weight would cost more than it finds; rows of NaN show in the first logits.
        parameter.place(Source(tensor, dtype=dtype).weight)


def test_large_half_precision_vectors_are_finite_though_their_sum_is_not() -> None:
    source = Source(torch.full((64,), 6e4, dtype=torch.float16), dtype="F16")
    parameter = make((64,))
    parameter.place(source.weight)
    assert torch.equal(parameter, source.tensor.float())


def test_slots_of_packed_tensors_divide() -> None:
    assert Slot(96, 32, 32, 64).divided(32) == Slot(3, 1, 1, 2)
