"""How does a test build a GGUF file that no writer would write? Field by field, each free to be wrong."""

from __future__ import annotations

import dataclasses
import struct

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


def string(text: str | bytes, *, length: int | None = None) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return u64(len(raw) if length is None else length) + raw


def field(key: str | bytes, kind: int, value: bytes) -> bytes:
    return string(key) + u32(kind) + value


def array(kind: int, count: int, items: bytes = b"") -> bytes:
    return u32(kind) + u64(count) + items


def tensor(
    name: str | bytes, dims: tuple[int, ...], kind: int = 0, offset: int = 0, *, num_dims: int | None = None
) -> bytes:
    sizes = b"".join(u64(dim) for dim in dims)
    return string(name) + u32(len(dims) if num_dims is None else num_dims) + sizes + u32(kind) + u64(offset)


@dataclasses.dataclass(kw_only=True)
class RawGguf:
    """The parts of a file. A count of None is the true one; data follows at the next multiple of 32."""

    magic: bytes = b"GGUF"
    version: int = 3
    fields: list[bytes] = dataclasses.field(default_factory=list)
    tensors: list[bytes] = dataclasses.field(default_factory=list)
    num_fields: int | None = None
    num_tensors: int | None = None
    data: bytes = b""

    def to_bytes(self) -> bytes:
        num_tensors = len(self.tensors) if self.num_tensors is None else self.num_tensors
        num_fields = len(self.fields) if self.num_fields is None else self.num_fields
        head = self.magic + u32(self.version) + u64(num_tensors) + u64(num_fields)
        head += b"".join(self.fields) + b"".join(self.tensors)
        return head + bytes(-len(head) % 32) + self.data
