"""Do the matrix kernels stay within the memory they are given, at sizes that fill no tile, run or vector?

A program for a sanitized library (`test_sanitizers.py` runs it): all memory is allocated at its exact size,
so that a read or write past an end is found. Without torch, whose own memory needs no checking here.
"""

from __future__ import annotations

import ctypes
import itertools
import sys

import numpy as np

from slipstream.kernels.cpu.library import library

# GGUF's number of a stored type -> columns and bytes of a block, where its half-precision scales lie, and the
# kind that keeps it (src/matrix.h).
BLOCKS = {
    2: (32, 18, (0,), 2),
    3: (32, 20, (0, 2), 3),
    6: (32, 22, (0,), 4),
    7: (32, 24, (0, 2), 5),
    8: (32, 34, (0,), 7),
    12: (256, 144, (0, 2), 3),
    13: (256, 176, (0, 2), 5),
    14: (256, 210, (208,), 6),
}
F32, BF16 = 0, 30
FLOAT_KINDS = ((F32, 0), (F32, 7), (F32, 8), (BF16, 1))
ROWS = (1, 15, 16, 17, 50)
TOKENS = (1, 2, 3, 5, 8, 13, 33)
RAGGED_COLS = (1, 31, 32, 33, 100, 288)
ALIGNMENT = 64


class Matrix(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("kind", ctypes.c_int32),
        ("rows", ctypes.c_int32),
        ("cols", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
    )


class Memory:
    """Exactly `size` bytes, aligned to 64, given back when this goes."""

    def __init__(self, size: int) -> None:
        self._c = ctypes.CDLL(None)
        self._c.free.argtypes = [ctypes.c_void_p]
        pointer = ctypes.c_void_p()
        status = self._c.posix_memalign(
            ctypes.byref(pointer), ctypes.c_size_t(ALIGNMENT), ctypes.c_size_t(size)
        )
        assert status == 0
        self.address, self.size = pointer.value, size

    def __del__(self) -> None:
        self._c.free(self.address)

    def view(self, dtype: type) -> np.ndarray:
        array = (ctypes.c_uint8 * self.size).from_address(self.address or 0)
        return np.frombuffer(array, dtype=dtype)


def filled(values: np.ndarray) -> Memory:
    memory = Memory(values.nbytes)
    memory.view(np.uint8)[:] = np.frombuffer(values.tobytes(), dtype=np.uint8)
    return memory


def stored_rows(rng: np.random.Generator, source: int, rows: int, cols: int) -> np.ndarray:
    """Return random weights of a stored type, with small scales."""
    if source == F32:
        return rng.standard_normal((rows, cols), dtype=np.float32)
    if source == BF16:
        return (rng.standard_normal((rows, cols), dtype=np.float32).view(np.uint32) >> 16).astype(np.uint16)
    block_cols, block_bytes, scales, _ = BLOCKS[source]
    blocks = rng.integers(0, 256, (rows * cols // block_cols, block_bytes), dtype=np.uint8)
    for place in scales:
        blocks[:, place : place + 2] = np.frombuffer(np.float16(0.01).tobytes(), dtype=np.uint8)
    return blocks


def run(rng: np.random.Generator, source: int, kind: int, rows: int, cols: int) -> None:
    native = library()
    weights = stored_rows(rng, source, rows, cols)
    stored = filled(weights)
    packed = Memory(native.ss_matrix_bytes(kind, rows, cols))
    assert native.ss_pack(kind, source, stored.address, rows, cols, packed.address) == 0
    matrix = Matrix(packed.address, kind, rows, cols, 0)
    record = ctypes.addressof(matrix)
    for tokens in TOKENS:
        x = rng.standard_normal((tokens, cols), dtype=np.float32)
        given, bias = filled(x), filled(rng.standard_normal(rows, dtype=np.float32))
        y = Memory(4 * tokens * rows)
        scratch = Memory(native.ss_linear_scratch_bytes(kind, cols, tokens))
        native.ss_linear(record, given.address, y.address, tokens, bias.address, scratch.address)
        result = y.view(np.float32).reshape(tokens, rows)
        assert np.isfinite(result).all()
        if kind == F32:
            expected = x.astype(np.float64) @ weights.T.astype(np.float64) + bias.view(np.float32)
            # Sums of at most 288 products of size 1 in float32: 288 x 2^-24 x a few, seldom near it.
            np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-4)
        look_up(rng, record, rows=rows, cols=cols, tokens=tokens)
        best = Memory(8 * tokens)
        native.ss_argmax(y.address, tokens, rows, best.address)
        assert (best.view(np.int64) == result.argmax(axis=1)).all()


def look_up(rng: np.random.Generator, record: int, *, rows: int, cols: int, tokens: int) -> None:
    ids, out = filled(rng.integers(0, rows, tokens, dtype=np.int64)), Memory(4 * tokens * cols)
    assert library().ss_embedding(record, ids.address, tokens, 2.0, out.address) == 0
    assert np.isfinite(out.view(np.float32)).all()


def main() -> None:
    rng = np.random.default_rng(5)
    library().ss_set_threads(int(sys.argv[1]))
    for rows, cols, (source, kind) in itertools.product(ROWS, RAGGED_COLS, FLOAT_KINDS):
        run(rng, source, kind, rows, cols)
    for rows, (source, (block_cols, _, _, kind)) in itertools.product(ROWS, BLOCKS.items()):
        for num_blocks in (1, 3):
            run(rng, source, kind, rows, num_blocks * block_cols)
    print("every size ran")


if __name__ == "__main__":
    main()
