"""What is a matrix that the CPU kernels read? Packed tiles in aligned memory, and the calls over them.

The layout is `src/matrix.h`. Packing, products and look-ups are calls into the compiled library;
`packed_reference.py` holds the torch definitions that they are checked against.
Invariant: a matrix owns its memory, aligned to 64 bytes; a record handed to the library points into it.
"""

from __future__ import annotations

import ctypes
import enum

import torch
from torch import Tensor

from slipstream.core.errors import UnsupportedError
from slipstream.kernels.cpu.arena import Arena
from slipstream.kernels.cpu.library import library

TILE_ROWS = 16
GROUP = 32


class Kind(enum.IntEnum):
    """Forms of a packed weight, as `src/matrix.h` numbers them."""

    F32 = 0
    BF16 = 1
    Q4_SYM = 2
    Q4_MIN = 3
    Q5_SYM = 4
    Q5_MIN = 5
    Q6 = 6
    Q8_GROUP = 7
    Q8_ROW = 8

    @property
    def is_floating(self) -> bool:
        return self <= Kind.BF16

    def keeps(self, stored: str) -> bool:
        """Say whether a tensor stored as `stored` is packed from its own bytes."""
        return native_kind(stored) is self


# GGUF's number of a stored type, and the kind that keeps its codes.
SOURCES = {
    "F32": (0, Kind.F32),
    "F16": (1, None),
    "Q4_0": (2, Kind.Q4_SYM),
    "Q4_1": (3, Kind.Q4_MIN),
    "Q5_0": (6, Kind.Q5_SYM),
    "Q5_1": (7, Kind.Q5_MIN),
    "Q8_0": (8, Kind.Q8_GROUP),
    "Q4_K": (12, Kind.Q4_MIN),
    "Q5_K": (13, Kind.Q5_MIN),
    "Q6_K": (14, Kind.Q6),
    "BF16": (30, Kind.BF16),
}


# PackStatus of `src/pack.h`.
_NOT_FINITE = 4
_REFUSALS = {
    1: "there is no such kind",
    2: "a kind keeps the codes of its own stored types, and only 8-bit kinds are made from floats",
    3: "the columns are not whole blocks of the stored type",
}


def native_kind(stored: str) -> Kind | None:
    """Return the kind that keeps a stored type's own numbers, or None where there is none."""
    return SOURCES[stored][1] if stored in SOURCES else None


class Matrix(ctypes.Structure):
    """The record of `src/matrix.h`."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("kind", ctypes.c_int32),
        ("rows", ctypes.c_int32),
        ("cols", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
    )


class PackedMatrix:
    """A matrix [rows, cols] in packed form. `data` is its memory, uint8."""

    def __init__(self, kind: Kind, *, rows: int, cols: int, arena: Arena | None = None) -> None:
        self.kind, self.rows, self.cols = kind, rows, cols
        self.library = library()
        self.num_bytes: int = self.library.ss_matrix_bytes(int(kind), rows, cols)
        self.data = (arena or Arena()).take(self.num_bytes)
        self.record = Matrix(self.data.data_ptr(), int(kind), rows, cols, 0)
        self.address = ctypes.addressof(self.record)

    @classmethod
    def empty(cls, kind: Kind, *, rows: int, cols: int, arena: Arena | None = None) -> PackedMatrix:
        """Allocate without writing, in a model's arena or alone; `pack` fills it in."""
        return cls(kind, rows=rows, cols=cols, arena=arena)

    @property
    def tile_bytes(self) -> int:
        return self.num_bytes // -(-self.rows // TILE_ROWS)

    def pack(self, rows: Tensor, source: str, *, first_row: int = 0) -> bool:
        """Pack whole rows of `source`: their bytes, or float32. `first_row` is a multiple of 16.

        Returns False where a weight or a scale is not finite. Raises UnsupportedError for a source that the
        kind does not take.
        """
        assert first_row % TILE_ROWS == 0 and rows.is_contiguous()
        assert first_row + rows.shape[0] <= self.rows
        out = self.data.data_ptr() + first_row // TILE_ROWS * self.tile_bytes
        status = self.library.ss_pack(
            int(self.kind), SOURCES[source][0], rows.data_ptr(), rows.shape[0], self.cols, out
        )
        if status in (0, _NOT_FINITE):
            return status == 0
        reason = _REFUSALS.get(status, f"status {status}")
        raise UnsupportedError(
            f"Weights stored as {source} with {self.cols} columns cannot be packed as {self.kind.name}: "
            f"{reason}. Use dtype='float32'."
        )


def linear(x: Tensor, matrix: PackedMatrix) -> Tensor:
    """Return x @ W^T of `x` [..., cols] float32; [..., rows] float32."""
    flat = x.reshape(-1, matrix.cols).contiguous()
    tokens = flat.shape[0]
    y = torch.empty(tokens, matrix.rows)
    native = matrix.library
    needed = native.ss_linear_scratch_bytes(int(matrix.kind), matrix.cols, tokens)
    scratch = torch.empty(needed, dtype=torch.uint8)
    native.ss_linear(matrix.address, flat.data_ptr(), y.data_ptr(), tokens, None, scratch.data_ptr())
    return y.view(*x.shape[:-1], matrix.rows)


def embedding(matrix: PackedMatrix, ids_T: Tensor, scale: float = 1.0) -> Tensor:
    """Return rows `ids_T` times `scale`, [T, cols] float32. Raises IndexError for an id that is no row."""
    ids = ids_T.to(torch.int64).contiguous()
    out = torch.empty(ids.numel(), matrix.cols)
    if matrix.library.ss_embedding(matrix.address, ids.data_ptr(), ids.numel(), scale, out.data_ptr()):
        raise IndexError(f"an id is not one of the {matrix.rows} rows")
    return out
