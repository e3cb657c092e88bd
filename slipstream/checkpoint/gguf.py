"""What does a GGUF file offer as a checkpoint? Its metadata as `config`, its tensors as ranges of rows."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from slipstream.checkpoint.base import Format, WeightTensor, require_rows
from slipstream.checkpoint.gguf_header import GgufTensor, read_gguf_header
from slipstream.checkpoint.gguf_types import decode
from slipstream.checkpoint.weight_file import WeightFile


class GgufCheckpoint:
    """An open GGUF file. `config` is its metadata; see `GgufHeader` for the types of the values."""

    format: Format = "gguf"

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.generation_config: dict[str, Any] = {}
        self._file = WeightFile(path)
        try:
            header = read_gguf_header(self._file)
        except BaseException:
            self._file.close()
            raise
        self.config = header.metadata
        self._tensors = header.tensors

    def tensor_names(self) -> list[str]:
        return [tensor.name for tensor in self._tensors]

    def tensors(self) -> Iterator[WeightTensor]:
        """Yield every tensor once, in file order."""
        for tensor in self._tensors:
            read = functools.partial(_read_rows, self._file, tensor)
            is_raw = len(tensor.shape) == 2 and tensor.shape[1] % tensor.block.elements == 0
            read_raw = functools.partial(_read_raw, self._file, tensor) if is_raw else None
            yield WeightTensor(tensor.name, tensor.shape, tensor.block.name, tensor.num_bytes, read, read_raw)

    def close(self) -> None:
        self._file.close()


def _read_raw(file: WeightFile, tensor: GgufTensor, start: int, stop: int) -> np.ndarray:
    """Return the stored bytes of whole rows of a matrix."""
    require_rows(tensor.name, tensor.shape, start, stop)
    row_bytes = tensor.shape[1] // tensor.block.elements * tensor.block.num_bytes
    raw = file.read(tensor.offset + start * row_bytes, (stop - start) * row_bytes)
    return raw.reshape(stop - start, row_bytes)


def _read_rows(file: WeightFile, tensor: GgufTensor, start: int, stop: int) -> Tensor:
    require_rows(tensor.name, tensor.shape, start, stop)
    block = tensor.block
    row_elements = math.prod(tensor.shape[1:])
    first, last = start * row_elements, stop * row_elements
    # Rows are whole blocks, except in 1-D tensors, where a "row" is one element: widen to blocks, then cut.
    first_block, end_block = first // block.elements, -(-last // block.elements)
    raw = file.read(
        tensor.offset + first_block * block.num_bytes, (end_block - first_block) * block.num_bytes
    )
    skipped = first_block * block.elements
    return decode(block, raw)[first - skipped : last - skipped].reshape(stop - start, *tensor.shape[1:])
