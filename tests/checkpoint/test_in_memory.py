"""Do tensors in memory read like those of a file, and is everything else refused by name?"""

from __future__ import annotations

import pytest
import torch

from slipstream.checkpoint.in_memory import InMemoryCheckpoint
from slipstream.core.errors import CheckpointError


@pytest.mark.parametrize(
    ("dtype", "name"),
    [(torch.float32, "F32"), (torch.float64, "F64"), (torch.float16, "F16"), (torch.bfloat16, "BF16")],
)
def test_tensors_are_listed_and_read_by_rows(dtype: torch.dtype, name: str) -> None:
    weight = torch.arange(12.0).reshape(4, 3).to(dtype).requires_grad_()
    checkpoint = InMemoryCheckpoint({"a.weight": weight, "a.scale": torch.tensor(2.0)})
    assert checkpoint.tensor_names() == ["a.weight", "a.scale"]
    matrix, scalar = checkpoint.tensors()
    assert (matrix.shape, matrix.dtype, matrix.num_bytes) == ((4, 3), name, 12 * dtype.itemsize)
    assert torch.equal(matrix.read(1, 3), weight[1:3]) and not matrix.read(1, 3).requires_grad
    assert torch.equal(matrix.read_all(), weight) and scalar.read_all() == 2.0
    with pytest.raises(IndexError):
        matrix.read(3, 5)
    checkpoint.close()
    assert list(checkpoint.tensors()) == []


def test_a_part_of_a_larger_tensor_is_read_in_its_own_order() -> None:
    weight = torch.arange(12.0).reshape(3, 4).T
    (tensor,) = InMemoryCheckpoint({"a": weight}).tensors()
    assert torch.equal(tensor.read(1, 3), weight[1:3])


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (torch.zeros(2, dtype=torch.int64), r"a tensor of torch\.int64"),
        ([1.0, 2.0], "a list"),
        (None, "a NoneType"),
    ],
)
def test_what_is_no_floating_tensor_is_refused(value: object, shown: str) -> None:
    with pytest.raises(CheckpointError, match=rf"'a\.weight' is {shown}; give torch tensors"):
        InMemoryCheckpoint({"a.weight": value})
