"""What does a model file offer, whatever its format?

A checkpoint streams: a tensor is a name, a shape and a way to read some of its rows; nothing is materialised
until a parameter asks for it. Every size and offset is checked against the file before anything is allocated.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

Format = Literal["hf", "gguf"]


@dataclasses.dataclass(frozen=True, slots=True)
class WeightTensor:
    """One named tensor of a checkpoint.

    `shape` is in torch's order (out, in). `dtype` is the stored type's name, e.g. "BF16" or "Q4_1".
    `read(start, stop)` returns rows start..stop of dim 0 on the CPU as a new or borrowed floating tensor
    (float32 for quantised types, the stored type otherwise); callers copy, they never write into it. Reading
    a few megabytes of rows at a time keeps memory flat. Raises IndexError for rows the tensor does not have,
    CheckpointError where the file changed since it was opened. A scalar has shape () and one row.
    `read_raw(start, stop)`, where there is one, returns the stored bytes of whole rows, uint8
    [stop - start, bytes of a row]. `read_into(start, stop, buffer)`, where there is one, writes them to a
    uint8 array instead, for types that torch has too: `read` with the memory chosen by the caller.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    num_bytes: int
    read: Callable[[int, int], Tensor] = dataclasses.field(repr=False)
    read_raw: Callable[[int, int], np.ndarray] | None = dataclasses.field(default=None, repr=False)
    read_into: Callable[[int, int, np.ndarray], None] | None = dataclasses.field(default=None, repr=False)

    def read_all(self) -> Tensor:
        return self.read(0, self.shape[0] if self.shape else 1)


def require_rows(name: str, shape: tuple[int, ...], start: int, stop: int) -> None:
    """Raise IndexError unless start..stop are rows of a tensor of this shape."""
    num_rows = shape[0] if shape else 1
    is_part_of_scalar = not shape and start == stop
    if not 0 <= start <= stop <= num_rows or is_part_of_scalar:
        raise IndexError(f"{name} has rows 0 to {num_rows}; {start} to {stop} were asked for")


class Checkpoint(Protocol):
    """An opened model: its configuration, its tensors, and what its tokenizer is made from.

    `config` is the parsed `config.json` ("hf") or the metadata of the file ("gguf", keys as in the file, the
    tokenizer's arrays included). `generation_config` is {} where the model has none.
    """

    format: Format
    path: Path
    config: dict[str, Any]
    generation_config: dict[str, Any]

    def tensor_names(self) -> list[str]: ...

    def tensors(self) -> Iterator[WeightTensor]:
        """Yield every tensor once, in file order."""
        ...

    def close(self) -> None: ...
