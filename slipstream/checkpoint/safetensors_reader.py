"""Which tensors does a safetensors file hold, and how are their rows read?

Invariant: the header is checked against the file before a weight is touched: a known dtype, non-negative
offsets, shape x item size equal to the extent, and extents that cover the data without a gap or an overlap.

Source: the safetensors format description (github.com/huggingface/safetensors): 8 bytes of header length,
a JSON header, the data. We check it ourselves, since the library maps the file (see `weight_file`).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from slipstream.checkpoint.base import WeightTensor, require_rows
from slipstream.checkpoint.json_file import parse_json_object
from slipstream.checkpoint.weight_file import WeightFile, damaged, shown, view_bytes

MAX_HEADER_BYTES = 100_000_000
_MAX_DIMS = 16

DTYPES: dict[str, torch.dtype] = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8},
    **{"U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8},
    "BOOL": torch.bool,
}


@dataclasses.dataclass(frozen=True, slots=True)
class _Extent:
    """Where one tensor lies; `offset` counts from the start of the file."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    offset: int
    num_bytes: int


class SafetensorsFile:
    """One open, checked safetensors file. `label` names it in messages where it is reached through a link."""

    def __init__(self, path: str | Path, *, label: str | Path | None = None) -> None:
        self._file = WeightFile(path, label=label)
        try:
            self._extents = _read_extents(self._file)
        except BaseException:
            self._file.close()
            raise

    def tensor_names(self) -> list[str]:
        return [extent.name for extent in self._extents]

    def tensors(self) -> Iterator[WeightTensor]:
        """Yield every tensor once, in file order."""
        for extent in self._extents:
            read = functools.partial(_read_rows, self._file, extent)
            read_into = functools.partial(_read_rows_into, self._file, extent)
            is_bool = DTYPES[extent.dtype] is torch.bool
            yield WeightTensor(
                extent.name,
                extent.shape,
                extent.dtype,
                extent.num_bytes,
                read,
                read_into=None if is_bool else read_into,
            )

    def close(self) -> None:
        self._file.close()


def _range_of(extent: _Extent, start: int, stop: int) -> tuple[int, int]:
    """Return where rows start..stop lie in the file: the offset and the number of bytes."""
    require_rows(extent.name, extent.shape, start, stop)
    row_bytes = extent.num_bytes // extent.shape[0] if extent.shape and extent.shape[0] else extent.num_bytes
    return extent.offset + start * row_bytes, (stop - start) * row_bytes


def _read_rows_into(file: WeightFile, extent: _Extent, start: int, stop: int, buffer: np.ndarray) -> None:
    offset, num_bytes = _range_of(extent, start, stop)
    if buffer.size != num_bytes:
        raise ValueError(f"rows {start} to {stop} of {extent.name} are {num_bytes} bytes, not {buffer.size}")
    file.read_into(offset, buffer)


def _read_rows(file: WeightFile, extent: _Extent, start: int, stop: int) -> torch.Tensor:
    raw = file.read(*_range_of(extent, start, stop))
    dtype = DTYPES[extent.dtype]
    # A bool tensor of bytes other than 0 and 1 is undefined behaviour in torch.
    stored = torch.from_numpy(raw != 0) if dtype is torch.bool else view_bytes(raw, dtype)
    return stored.reshape((stop - start, *extent.shape[1:]) if extent.shape else ())


def _read_extents(file: WeightFile) -> list[_Extent]:
    """Parse the header; return the tensors in file order."""
    if file.size < 8:
        raise damaged(file.label, f"has {file.size} bytes; a safetensors file has at least 8")
    header_bytes = int.from_bytes(file.read_bytes(0, 8), "little")
    largest = min(MAX_HEADER_BYTES, file.size - 8)
    if header_bytes > largest:
        raise damaged(file.label, f"header length is {header_bytes}; allowed: at most {largest}")
    header = file.read_bytes(8, header_bytes)
    if not header.startswith(b"{"):
        raise damaged(file.label, "the header does not begin with '{'")
    entries = parse_json_object(header, label=file.label, unique_keys=True)
    _check_metadata(file, entries.pop("__metadata__", {}))
    data_start = 8 + header_bytes
    extents = [_extent(file, name, entry, data_start) for name, entry in entries.items()]
    # Empty tensors share their offset with a neighbour and come first.
    extents.sort(key=lambda extent: (extent.offset, extent.num_bytes))
    _check_cover(file, extents, data_start)
    return extents


def _check_metadata(file: WeightFile, metadata: Any) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise damaged(file.label, f"__metadata__ is {shown(metadata)}; allowed: an object of strings")


def _extent(file: WeightFile, name: str, entry: Any, data_start: int) -> _Extent:
    field = f"tensor {shown(name)}"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise damaged(file.label, f"{field} is {shown(entry)}; needed: dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise damaged(file.label, f"{field} has dtype {shown(dtype)}; supported: {', '.join(DTYPES)}")
    if not _are_sizes(shape) or len(shape) > _MAX_DIMS:
        raise damaged(
            file.label, f"{field} has shape {shown(shape)}; allowed: at most {_MAX_DIMS} sizes of 0 to 2^63"
        )
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise damaged(
            file.label, f"{field} has data_offsets {shown(offsets)}; needed: begin <= end, not negative"
        )
    begin, end = offsets
    if data_start + end > file.size:
        raise damaged(
            file.label, f"{field} ends at byte {end} of {file.size - data_start} bytes of data (truncated?)"
        )
    num_bytes = math.prod(shape) * DTYPES[dtype].itemsize
    if num_bytes != end - begin:
        raise damaged(
            file.label, f"{field}, {dtype} {shape}, needs {num_bytes} bytes; its offsets span {end - begin}"
        )
    return _Extent(name, tuple(shape), dtype, data_start + begin, num_bytes)


def _are_sizes(value: Any) -> bool:
    # type() and not isinstance: JSON's true is no size.
    return isinstance(value, list) and all(type(size) is int and 0 <= size < 2**63 for size in value)


def _check_cover(file: WeightFile, extents: list[_Extent], data_start: int) -> None:
    end, previous = data_start, "the header"
    for extent in extents:
        if extent.offset != end:
            problem = "overlaps" if extent.offset < end else "leaves a gap after"
            raise damaged(file.label, f"tensor {shown(extent.name)} {problem} {previous}")
        end, previous = extent.offset + extent.num_bytes, shown(extent.name)
    if end != file.size:
        raise damaged(file.label, f"has {file.size - end} bytes after {previous} that belong to no tensor")
