"""How do tensors that are already in memory become a checkpoint? For weights that a program replaces.

Invariant: the tensors are read, never kept: who made them may change them once the load has returned.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slipstream.checkpoint.base import Format, WeightTensor, require_rows
from slipstream.core.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

TYPE_NAMES = {
    "torch.float64": "F64",
    "torch.float32": "F32",
    "torch.float16": "F16",
    "torch.bfloat16": "BF16",
}


class InMemoryCheckpoint:
    """Tensors by the names they have in a Hugging Face checkpoint, on any device. There is no configuration.

    Raises CheckpointError for a value that is not a floating tensor.
    """

    format: Format = "hf"
    path = Path("tensors in memory")

    def __init__(self, tensors: Mapping[str, Any]) -> None:
        self.config: dict[str, Any] = {}
        self.generation_config: dict[str, Any] = {}
        self._tensors = [_weight_tensor(name, tensor) for name, tensor in tensors.items()]

    def tensor_names(self) -> list[str]:
        return [tensor.name for tensor in self._tensors]

    def tensors(self) -> Iterator[WeightTensor]:
        yield from self._tensors

    def close(self) -> None:
        self._tensors = []


def _weight_tensor(name: Any, tensor: Any) -> WeightTensor:
    dtype = TYPE_NAMES.get(str(getattr(tensor, "dtype", None)))
    if not isinstance(name, str) or dtype is None:
        raise CheckpointError(
            f"The weight {name!r} is {_shown(tensor)}; give torch tensors of {', '.join(TYPE_NAMES)} by the "
            "names they have in a Hugging Face checkpoint."
        )
    shape = tuple(tensor.shape)

    def read(start: int, stop: int) -> Tensor:
        require_rows(name, shape, start, stop)
        rows = tensor.detach()
        return (rows[start:stop] if shape else rows).cpu()

    return WeightTensor(name, shape, dtype, tensor.nbytes, read)


def _shown(value: Any) -> str:
    return f"a tensor of {value.dtype}" if hasattr(value, "dtype") else f"a {type(value).__name__}"
