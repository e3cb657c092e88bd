"""Do tensors of every stored type get into packed form, rows in order, and damaged ones not?"""

from __future__ import annotations

from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize, quantize

from slipstream.checkpoint.base import WeightTensor
from slipstream.checkpoint.gguf_types import BLOCK_TYPES, decode
from slipstream.core.errors import CheckpointError, UnsupportedError
from slipstream.kernels.cpu.packed_matrix import Kind
from slipstream.layers.build_context import BuildContext
from slipstream.layers.linear import QKVLinear, RowParallelLinear
from slipstream.parallel.mesh import Mesh
from slipstream.quant.gguf import Gguf
from slipstream.quant.int8 import Int8

COLS = 256
TYPES = {name: gguf.GGMLQuantizationType[name] for name in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")}
ALL = {block.name: block for block in BLOCK_TYPES.values()}


Stored = tuple[WeightTensor, torch.Tensor]


def tensor_of(name: str, rows: int, *, seed: int = 0, spoil: bool = False) -> Stored:
    """Return a stored matrix [rows, COLS] and the float32 it stands for."""
    values = np.random.default_rng(seed).standard_normal((rows, COLS)).astype(np.float32)
    raw = quantize(values, TYPES[name])
    if spoil:
        # The scale of the last row's first block becomes NaN.
        raw[-1, :2] = [0xFF, 0x7F]
    block = ALL[name]

    def read(start: int, stop: int) -> torch.Tensor:
        return decode(block, raw[start:stop].reshape(-1)).reshape(stop - start, COLS)

    expected = torch.from_numpy(dequantize(raw, TYPES[name]).astype(np.float32))
    stored = WeightTensor("w", (rows, COLS), name, raw.nbytes, read, lambda a, b: raw[a:b].copy())
    return stored, expected


def floats(rows: int, dtype: torch.dtype, name: str) -> Stored:
    values = torch.randn(rows, COLS, generator=torch.Generator().manual_seed(rows)).to(dtype)
    return WeightTensor("w", (rows, COLS), name, values.nbytes, lambda a, b: values[a:b]), values.float()


def output_layer(quant: Any, rows: int) -> Any:
    return RowParallelLinear(BuildContext(quant=quant), COLS, rows)


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("rows", [16, 40, 7])
def test_stored_types_stay_as_they_are(name: str, rows: int) -> None:
    layer = output_layer(Gguf(), rows)
    tensor, expected = tensor_of(name, rows)
    layer.weight.place(tensor)
    (matrix,) = layer.weight.in_order()
    assert matrix.kind.keeps(name)
    rows_back = layer.quant.look_up(layer, torch.arange(rows))
    # scale x code + minimum in float32, rounded once here and twice there.
    torch.testing.assert_close(rows_back, expected, rtol=1e-6, atol=1e-6)
    # A packed matrix is no larger than the file's, but for rows padded to a tile.
    assert layer.weight.nbytes <= tensor.num_bytes / rows * -(-rows // 16) * 16 + 64


def test_slots_of_a_fused_layer_may_be_of_different_types() -> None:
    layer: Any = QKVLinear(BuildContext(quant=Gguf()), COLS, num_heads=4, num_kv_heads=2, head_dim=16)
    expected = []
    for slot, name, rows in (("v", "Q8_0", 32), ("q", "Q4_1", 64), ("k", "Q5_0", 32)):
        tensor, values = tensor_of(name, rows, seed=rows)
        layer.weight.place(tensor, slot)
        expected.append((slot, values))
    weight = torch.cat([values for _, values in sorted(expected, key=lambda pair: "qkv".index(pair[0]))])
    x = torch.randn(3, COLS, generator=torch.Generator().manual_seed(1))
    # Activations in int8: at most 1/254 of a group's largest, on 256 terms that add up at random.
    torch.testing.assert_close(layer(x), x @ weight.T, rtol=0, atol=0.35)
    assert float((layer(x) - x @ weight.T).abs().mean()) < 0.08


@pytest.mark.parametrize(
    ("stored", "dtype", "kind"),
    [
        ("F32", torch.float32, Kind.F32),
        ("F16", torch.float16, Kind.F32),
        ("BF16", torch.bfloat16, Kind.BF16),
    ],
)
def test_floats_of_a_gguf_file_stay_exact(stored: str, dtype: torch.dtype, kind: Kind) -> None:
    layer = output_layer(Gguf(), 24)
    tensor, expected = floats(24, dtype, stored)
    layer.weight.place(tensor)
    assert layer.weight.in_order()[0].kind is kind
    assert torch.equal(layer.quant.look_up(layer, torch.arange(24)), expected)


def test_int8_has_a_scale_per_output() -> None:
    layer = output_layer(Int8(), 40)
    tensor, expected = floats(40, torch.bfloat16, "BF16")
    layer.weight.place(tensor)
    step = expected.abs().amax(1, keepdim=True) / 127
    back = layer.quant.look_up(layer, torch.arange(40))
    assert bool(((back - expected).abs() <= step * 0.5 + 1e-6).all())


def test_types_without_a_kernel_become_int8_in_groups() -> None:
    values = torch.randn(32, COLS, generator=torch.Generator().manual_seed(4))
    tensor = WeightTensor(
        "w", (32, COLS), "Q3_K", 1, lambda a, b: values[a:b], lambda a, b: pytest.fail("raw")
    )
    layer = output_layer(Gguf(), 32)
    layer.weight.place(tensor)
    assert layer.weight.in_order()[0].kind is Kind.Q8_GROUP
    largest = values.reshape(32, -1, 32).abs().amax(2).repeat_interleave(32, 1)
    error = (layer.quant.look_up(layer, torch.arange(32)) - values).abs()
    # Half a step of 1/127 of the group's largest, and a scale rounded to half precision (2^-11).
    assert bool((error <= largest * (0.5 / 127 + 2**-11)).all())


def test_damaged_and_misshapen_tensors_are_refused() -> None:
    layer = output_layer(Gguf(), 40)
    with pytest.raises(CheckpointError, match="'w' \\(Q4_0\\) holds NaN or infinity in rows 0 to 40"):
        layer.weight.place(tensor_of("Q4_0", 40, spoil=True)[0])
    with pytest.raises(CheckpointError, match="has shape"):
        layer.weight.place(tensor_of("Q4_0", 24)[0])
    with pytest.raises(CheckpointError, match="it is quantised already"):
        output_layer(Int8(), 40).weight.place(tensor_of("Q4_0", 40)[0])


def test_tensor_ranks_are_refused() -> None:
    build = BuildContext(quant=Gguf(), mesh=Mesh(tp_rank=0, tp_size=2))
    with pytest.raises(UnsupportedError, match="tensor ranks"):
        RowParallelLinear(build, COLS, 32)
