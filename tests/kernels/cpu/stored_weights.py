"""Which weights are the matrix kernels tested with? Random rows of every stored type and their values."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize
from torch import Tensor

from slipstream.kernels.cpu.library import LibraryUnavailable, library
from slipstream.kernels.cpu.packed_matrix import SOURCES, Kind, PackedMatrix

# Where a block holds half floats: scales, minima.
_HALF_PLACES = {
    **{"Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,)},
    **{"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)},
}
FLOAT_SOURCES = ("F32", "F16", "BF16")
QUANTIZED_SOURCES = tuple(_HALF_PLACES)
# Every kind, made from each source that it takes.
PACKINGS = [
    *((source, kind) for source, (_, kind) in SOURCES.items() if kind is not None),
    ("F16", Kind.F32),
    ("F32", Kind.Q8_GROUP),
    ("F32", Kind.Q8_ROW),
    ("BF16", Kind.Q8_ROW),
]


def needs_library() -> None:
    """Skip where this machine can neither find nor build the kernels."""
    try:
        library()
    except LibraryUnavailable as error:
        pytest.skip(f"no CPU kernels here: {error.reason}")


def block_columns(source: str) -> int:
    return gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[source]][0]


def stored_rows(source: str, rows: int, cols: int, *, seed: int = 0) -> Tensor:
    """Return random weights as the bytes a file holds, [rows, bytes]; scales about 0.01 of either sign."""
    rng = np.random.default_rng((seed, rows, cols, SOURCES[source][0]))
    if source in FLOAT_SOURCES:
        dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[source]
        return torch.from_numpy(rng.standard_normal((rows, cols))).to(dtype).view(torch.uint8)
    columns, num_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[source]]
    assert cols % columns == 0
    blocks = rng.integers(0, 256, (rows, cols // columns, num_bytes), dtype=np.uint8)
    for place in _HALF_PLACES[source]:
        halves = rng.uniform(-0.02, 0.02, blocks.shape[:2]).astype(np.float16)
        blocks[:, :, place : place + 2] = halves[:, :, None].view(np.uint8)
    return torch.from_numpy(blocks.reshape(rows, -1))


def float_values(source: str, stored: Tensor) -> Tensor:
    """Return what `stored` means as float32, by the gguf package for quantised types."""
    if source in FLOAT_SOURCES:
        dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[source]
        return stored.view(dtype).float()
    values = dequantize(stored.numpy(), gguf.GGMLQuantizationType[source])
    return torch.from_numpy(values).float().reshape(stored.shape[0], -1)


def packed(source: str, kind: Kind, rows: int, cols: int, *, seed: int = 0) -> PackedMatrix:
    matrix = PackedMatrix.empty(kind, rows=rows, cols=cols)
    assert matrix.pack(stored_rows(source, rows, cols, seed=seed), source)
    return matrix


def random_activations(tokens: int, cols: int, *, seed: int = 0) -> Tensor:
    """Return [tokens, cols], some groups of which are much larger than others, and some zero."""
    generator = torch.Generator().manual_seed(1000 * seed + 10 * tokens + cols)
    x = torch.randn(tokens, cols, generator=generator)
    sizes = torch.tensor([1.0, 30.0, 0.01, 1.0, 0.0])
    choice = torch.randint(0, 5, (tokens, -(-cols // 32)), generator=generator)
    return x * sizes[choice].repeat_interleave(32, dim=1)[:, :cols]
