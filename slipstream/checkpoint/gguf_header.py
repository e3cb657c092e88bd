"""What does a GGUF file say about itself? Its metadata and the place of every tensor, checked and in order.

Invariants: every count and length is compared with the bytes left in the file before anything is allocated;
tensors lie inside the data section, aligned and without overlap; keys and tensor names are unique. Whatever
breaks this raises `CheckpointError` naming the file and the field.

Strings are decoded as UTF-8 with `surrogateescape`: a tokenizer may hold bytes that are no UTF-8, two such
tokens must stay distinct, and `text.encode("utf-8", "surrogateescape")` gives the bytes back. Keys and tensor
names must be valid UTF-8. Arrays of arrays are refused: no model uses them.

Source: the GGUF specification, versions 2 and 3, little-endian (ggml-org/ggml, docs/gguf.md).
"""

from __future__ import annotations

import dataclasses
import math
import struct
from typing import Any

import numpy as np

from slipstream.checkpoint.gguf_types import BLOCK_TYPES, UNREAD_TYPES, BlockType
from slipstream.checkpoint.weight_file import WeightFile, damaged, shown
from slipstream.core.errors import CheckpointError

# Generous for real models (a vocabulary of 256k with scores and merges is 20 MB), small enough that a hostile
# file is refused within a second.
_MAX_HEADER_BYTES = 2**28
_MAX_STRINGS = 2**20
_MAX_KEYS = 2**14
_MAX_TENSORS = 2**16
_MAX_DIMS = 4
_MAX_ALIGNMENT = 2**20

_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS = {
    **{0: np.dtype("u1"), 1: np.dtype("i1"), 2: np.dtype("<u2"), 3: np.dtype("<i2"), 4: np.dtype("<u4")},
    **{5: np.dtype("<i4"), 6: np.dtype("<f4"), _BOOL: np.dtype("u1"), 10: np.dtype("<u8")},
    **{11: np.dtype("<i8"), 12: np.dtype("<f8")},
}
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")


@dataclasses.dataclass(frozen=True, slots=True)
class GgufTensor:
    """Where one tensor lies: `shape` in torch's order, `offset` from the start of the file."""

    name: str
    shape: tuple[int, ...]
    block: BlockType
    offset: int
    num_bytes: int


@dataclasses.dataclass(frozen=True, slots=True)
class GgufHeader:
    """Metadata values are int, float, bool, str, list[str], or a 1-D numpy array for other arrays."""

    version: int
    metadata: dict[str, Any]
    tensors: list[GgufTensor]


def read_gguf_header(file: WeightFile) -> GgufHeader:
    """Parse and check the header of an open GGUF file; its tensors come in file order."""
    reader = _HeaderReader(file)
    version = reader.magic_and_version()
    num_tensors = reader.count("tensor count", limit=_MAX_TENSORS, min_bytes=33)
    num_keys = reader.count("metadata count", limit=_MAX_KEYS, min_bytes=13)
    metadata: dict[str, Any] = {}
    for _ in range(num_keys):
        key = reader.name("metadata key", limit=2**16 - 1)
        if key in metadata:
            raise damaged(file.label, f"metadata key {shown(key)} appears twice")
        metadata[key] = reader.value(key)
    _refuse_split(file, metadata)
    alignment = _alignment(file, metadata)
    entries: dict[str, tuple[tuple[int, ...], BlockType, int]] = {}
    for _ in range(num_tensors):
        name = reader.name("tensor name", limit=1024)
        if name in entries:
            raise damaged(file.label, f"tensor {shown(name)} appears twice")
        entries[name] = reader.tensor_entry(name)
    data_start = -(-reader.position // alignment) * alignment
    return GgufHeader(version, metadata, _place(file, entries, data_start, alignment))


def _refuse_split(file: WeightFile, metadata: dict[str, Any]) -> None:
    count = metadata.get("split.count", 0)
    if not isinstance(count, int) or count > 1:
        raise CheckpointError(
            f"{file.label}: is one part of a split GGUF (split.count = {shown(count)}); only whole files are "
            "read. Join the parts with llama-gguf-split --merge and give the result."
        )


def _alignment(file: WeightFile, metadata: dict[str, Any]) -> int:
    alignment = metadata.get("general.alignment", 32)
    is_integer = isinstance(alignment, int) and not isinstance(alignment, bool)
    if not is_integer or not 8 <= alignment <= _MAX_ALIGNMENT or alignment & (alignment - 1):
        raise damaged(
            file.label,
            f"general.alignment is {shown(alignment)}; allowed: a power of two from 8 to {_MAX_ALIGNMENT}",
        )
    return alignment


def _place(
    file: WeightFile,
    entries: dict[str, tuple[tuple[int, ...], BlockType, int]],
    data_start: int,
    alignment: int,
) -> list[GgufTensor]:
    """Turn offsets into the data section into checked ranges of the file, in file order."""
    tensors: list[GgufTensor] = []
    end, previous = data_start, "the header"
    for name, (shape, block, offset) in sorted(entries.items(), key=lambda entry: entry[1][2]):
        num_bytes = math.prod(shape) // block.elements * block.num_bytes
        start = data_start + offset
        if offset % alignment:
            raise damaged(file.label, f"tensor {shown(name)} at {offset} is not aligned to {alignment}")
        if start < end:
            raise damaged(file.label, f"tensor {shown(name)} overlaps {previous}")
        if start + num_bytes > file.size:
            raise damaged(
                file.label,
                f"tensor {shown(name)} ends at byte {start + num_bytes} of a file of {file.size}",
            )
        tensors.append(GgufTensor(name, shape, block, start, num_bytes))
        end, previous = start + num_bytes, shown(name)
    return tensors


class _HeaderReader:
    """A cursor over the front of the file, fetched in doubling steps. `position` is the next byte."""

    def __init__(self, file: WeightFile) -> None:
        self.file = file
        self.position = 0
        self._data = b""
        self._strings_left = _MAX_STRINGS

    def magic_and_version(self) -> int:
        if (magic := self._take(4, "magic")) != b"GGUF":
            raise damaged(self.file.label, f"starts with {magic!r}, a GGUF file with b'GGUF'")
        version = self._u32("version")
        if version & 0xFFFF == 0:
            raise CheckpointError(
                f"{self.file.label}: is a big-endian GGUF file; only little-endian ones are read. "
                "Convert it with gguf-convert-endian or download the usual variant."
            )
        if version not in (2, 3):
            raise CheckpointError(
                f"{self.file.label}: has GGUF version {version}; versions 2 and 3 are read. "
                "Convert the model again with a current converter."
            )
        return version

    def count(self, what: str, *, limit: int, min_bytes: int) -> int:
        """Read a count of items that each take at least `min_bytes` of this file."""
        count = self._u64(what)
        fitting = min(limit, (self.file.size - self.position) // min_bytes)
        if count > fitting:
            raise damaged(self.file.label, f"{what} is {count}; at most {fitting} fit into this file")
        return count

    def name(self, what: str, *, limit: int) -> str:
        length = self._u64(f"length of a {what}")
        if not 1 <= length <= limit:
            raise damaged(self.file.label, f"a {what} has {length} bytes; allowed: 1 to {limit}")
        raw = self._take(length, what)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise damaged(self.file.label, f"{what} {shown(raw)} is not valid UTF-8") from error

    def value(self, key: str) -> Any:
        field = f"metadata {shown(key)}"
        kind = self._u32(field)
        if kind == _STRING:
            return self._strings(1, field)[0]
        if kind != _ARRAY:
            value = self._numbers(kind, 1, field)[0]
            return value.item()
        kind = self._u32(field)
        if kind == _ARRAY:
            raise damaged(self.file.label, f"{field} is an array of arrays; arrays hold numbers or strings")
        item_bytes = 8 if kind == _STRING else self._dtype(kind, field).itemsize
        count = self.count(f"length of {field}", limit=2**62, min_bytes=item_bytes)
        return self._strings(count, field) if kind == _STRING else self._numbers(kind, count, field)

    def tensor_entry(self, name: str) -> tuple[tuple[int, ...], BlockType, int]:
        """Return (shape in torch's order, type, offset into the data section)."""
        field = f"tensor {shown(name)}"
        num_dims = self._u32(field)
        if not 1 <= num_dims <= _MAX_DIMS:
            raise damaged(self.file.label, f"{field} has {num_dims} dimensions; allowed: 1 to {_MAX_DIMS}")
        dims = struct.unpack(f"<{num_dims}Q", self._take(8 * num_dims, field))
        if 0 in dims or math.prod(dims) >= 2**63:
            raise damaged(self.file.label, f"{field} has dimensions {dims}; their product must be 1 to 2^63")
        block = self._block_type(self._u32(field), field)
        if dims[0] % block.elements:
            raise damaged(
                self.file.label,
                f"{field} has rows of {dims[0]} elements; {block.name} needs multiples of {block.elements}",
            )
        return tuple(reversed(dims)), block, self._u64(field)

    def _block_type(self, kind: int, field: str) -> BlockType:
        if kind not in BLOCK_TYPES:
            name = UNREAD_TYPES.get(kind, f"number {kind}")
            supported = ", ".join(block.name for block in BLOCK_TYPES.values())
            raise CheckpointError(
                f"{self.file.label}: {field} has the type {name}, which is not read; supported: {supported}. "
                "Use a variant of the model in one of these, for example Q4_K_M or Q8_0."
            )
        return BLOCK_TYPES[kind]

    def _dtype(self, kind: int, field: str) -> np.dtype[Any]:
        if kind not in _SCALARS:
            raise damaged(self.file.label, f"{field} has the unknown value type {kind}; allowed: 0 to 12")
        return _SCALARS[kind]

    def _numbers(self, kind: int, count: int, field: str) -> np.ndarray:
        dtype = self._dtype(kind, field)
        # frombuffer aliases the bytes just taken, which nothing else holds; the copy makes it writable.
        numbers = np.frombuffer(self._take(count * dtype.itemsize, field), dtype=dtype).copy()
        if kind != _BOOL:
            return numbers
        if numbers.size and numbers.max() > 1:
            raise damaged(
                self.file.label, f"{field} holds a truth value of {numbers.max()}; allowed: 0 and 1"
            )
        return numbers.view(np.bool_)

    def _strings(self, count: int, field: str) -> list[str]:
        self._strings_left -= count
        if self._strings_left < 0:
            raise damaged(self.file.label, f"{field} brings the metadata to more than {_MAX_STRINGS} strings")
        strings: list[str] = []
        while True:
            wanted = self._append_strings(strings, count)
            if wanted == 0:
                return strings
            self._fetch(wanted, field)

    def _append_strings(self, strings: list[str], count: int) -> int:
        """Append strings from the fetched bytes until `count`; return the end of the first one missing."""
        # A vocabulary is hundreds of thousands of strings: this loop is the time a header takes.
        data, position, end = self._data, self.position, len(self._data)
        unpack, append = _U64.unpack_from, strings.append
        for _ in range(count - len(strings)):
            start = stop = position + 8
            if start <= end:
                stop = start + unpack(data, position)[0]
            if stop > end or start > end:
                self.position = position
                return stop
            append(data[start:stop].decode("utf-8", "surrogateescape"))
            position = stop
        self.position = position
        return 0

    def _u32(self, field: str) -> int:
        return _U32.unpack(self._take(4, field))[0]

    def _u64(self, field: str) -> int:
        return _U64.unpack(self._take(8, field))[0]

    def _take(self, num_bytes: int, field: str) -> bytes:
        start, stop = self.position, self.position + num_bytes
        if stop > len(self._data):
            self._fetch(stop, field)
        self.position = stop
        return self._data[start:stop]

    def _fetch(self, stop: int, field: str) -> None:
        """Make the bytes before `stop` available, or raise where the file has no such byte."""
        if stop > self.file.size:
            raise damaged(self.file.label, f"{field} ends at byte {stop} of a file of {self.file.size} bytes")
        if stop > _MAX_HEADER_BYTES:
            raise damaged(self.file.label, f"the header goes beyond {_MAX_HEADER_BYTES} bytes at {field}")
        fetched = len(self._data)
        target = min(self.file.size, max(stop, 2 * fetched, 2**20))
        self._data += self.file.read_bytes(fetched, target - fetched)
