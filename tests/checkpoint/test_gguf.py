"""A GGUF file streams: any range of rows is the same rows of the whole, in bounded memory."""

from __future__ import annotations

import os
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from slipstream.checkpoint.base import WeightTensor
from slipstream.checkpoint.gguf import GgufCheckpoint
from slipstream.core.errors import CheckpointError

SHAPES = {"vector": (64,), "matrix": (10, 512), "cube": (6, 3, 256), "four": (2, 3, 2, 256)}


def write(path: Path, tensors: dict[str, tuple[np.ndarray, gguf.GGMLQuantizationType]]) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("llama.block_count", 2)
    for name, (values, kind) in tensors.items():
        writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    generator = np.random.default_rng(1)
    values = {name: generator.standard_normal(shape, dtype=np.float32) for name, shape in SHAPES.items()}
    kinds = gguf.GGMLQuantizationType
    written = {f"{name}.q4_1": (value, kinds.Q4_1) for name, value in values.items()}
    written |= {f"{name}.q8_0": (value, kinds.Q8_0) for name, value in values.items()}
    written |= {f"{name}.bf16": (value, kinds.BF16) for name, value in values.items()}
    written |= {f"{name}.f32": (value, kinds.F32) for name, value in values.items()}
    return write(tmp_path / "x.gguf", written)


def find(checkpoint: GgufCheckpoint, name: str) -> WeightTensor:
    return next(tensor for tensor in checkpoint.tensors() if tensor.name == name)


def test_tensors_come_once_in_file_order_with_their_types(path: Path) -> None:
    checkpoint = GgufCheckpoint(path)
    assert checkpoint.format == "gguf" and checkpoint.path == path and checkpoint.generation_config == {}
    assert checkpoint.config["llama.block_count"] == 2
    names = [f"{name}.{kind}" for kind in ("q4_1", "q8_0", "bf16", "f32") for name in SHAPES]
    assert checkpoint.tensor_names() == names == [tensor.name for tensor in checkpoint.tensors()]
    dtypes = {"q4_1": torch.float32, "q8_0": torch.float32, "bf16": torch.bfloat16, "f32": torch.float32}
    for tensor in checkpoint.tensors():
        shape, kind = tensor.name.split(".")
        assert tensor.shape == SHAPES[shape] and tensor.dtype == kind.upper()
        assert tensor.read_all().dtype == dtypes[kind] and tensor.read_all().shape == tensor.shape


def test_every_range_of_rows_is_that_range_of_the_whole(path: Path) -> None:
    for tensor in GgufCheckpoint(path).tensors():
        whole, num_rows = tensor.read_all(), tensor.shape[0]
        for start in range(num_rows + 1):
            for stop in range(start, num_rows + 1):
                part = tensor.read(start, stop)
                assert part.shape == (stop - start, *tensor.shape[1:]) and torch.equal(
                    part, whole[start:stop]
                )


def test_rows_that_are_not_there_are_refused(path: Path) -> None:
    matrix = find(GgufCheckpoint(path), "matrix.q4_1")
    for start, stop in [(-1, 2), (3, 2), (0, 11), (11, 11)]:
        with pytest.raises(IndexError, match=r"matrix.q4_1 has rows 0 to 10"):
            matrix.read(start, stop)


def test_what_is_read_is_the_callers_own(path: Path) -> None:
    matrix = find(GgufCheckpoint(path), "matrix.f32")
    first, second = matrix.read(0, 2), matrix.read(0, 2)
    first.zero_()
    assert second.abs().sum() > 0 and torch.equal(second, matrix.read(0, 2))


def test_a_real_model_reads_as_the_oracle_does(smollm2_path: Path, smollm2_oracle: gguf.GGUFReader) -> None:
    checkpoint = GgufCheckpoint(smollm2_path)
    stored = {item.name: item for item in smollm2_oracle.tensors}
    for name in ["token_embd.weight", "blk.0.attn_q.weight", "blk.29.ffn_down.weight", "output_norm.weight"]:
        tensor, item = find(checkpoint, name), stored[name]
        last = tensor.shape[0]
        expected = gguf.dequantize(item.data[last - 100 :], item.tensor_type)
        # The same operations in the same order: equal to the bit.
        np.testing.assert_array_equal(tensor.read(last - 100, last).numpy(), expected)


def test_every_type_of_a_mixed_real_model_is_finite_and_small(gemma3_path: Path) -> None:
    seen = set[str]()
    for tensor in GgufCheckpoint(gemma3_path).tensors():
        if tensor.dtype in seen:
            continue
        seen.add(tensor.dtype)
        rows = tensor.read(0, min(64, tensor.shape[0]))
        assert torch.isfinite(rows).all() and 0 < rows.std() < 100
    assert seen == {"F32", "Q5_0", "Q8_0", "Q4_K", "Q6_K"}


def test_streaming_takes_a_few_chunks_of_memory(tmp_path: Path) -> None:
    values = np.random.default_rng(2).standard_normal((8192, 1024), dtype=np.float32)
    checkpoint = GgufCheckpoint(write(tmp_path / "x.gguf", {"w": (values, gguf.GGMLQuantizationType.Q4_1)}))
    chunk_bytes = 1024 * 1024 * 4
    tracemalloc.start()
    try:
        for start in range(0, 8192, 1024):
            find(checkpoint, "w").read(start, start + 1024)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # One chunk of floats, one still referenced, its packed bytes (a sixth) and tiles; the tensor is 8 chunks.
    assert peak < 3 * chunk_bytes


def test_truncation_while_reading_is_an_error(path: Path) -> None:
    checkpoint = GgufCheckpoint(path)
    tensors = list(checkpoint.tensors())
    tensors[0].read_all()
    os.truncate(path, path.stat().st_size // 2)
    for tensor in tensors:
        with pytest.raises(CheckpointError, match=r"x.gguf: changed while being read"):
            tensor.read_all()


def test_a_failed_open_and_a_close_leave_no_descriptor(path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    checkpoint = GgufCheckpoint(path)
    tensor = find(checkpoint, "vector.f32")
    checkpoint.close()
    checkpoint.close()
    with pytest.raises(CheckpointError, match="closed"):
        tensor.read_all()
    os.truncate(path, 40)
    with pytest.raises(CheckpointError):
        GgufCheckpoint(path)
    assert len(os.listdir("/proc/self/fd")) == before
