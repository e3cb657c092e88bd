"""A randomly damaged file opens and reads, or ends in `CheckpointError`: no other error, no more memory.

A mutation changes bytes, writes an extreme number, cuts, inserts or repeats a piece. Files are small and most
damage hits the header, where the decisions are. Whatever still opens is read to the end.
Seconds are CPU time, so that a busy machine does not fail a test.
"""

from __future__ import annotations

import json
import random
import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from slipstream.checkpoint.opening import open_checkpoint
from slipstream.core.errors import CheckpointError

EXTREMES = [0, 1, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**61, 2**63 - 1, 2**63, 2**64 - 32, 2**64 - 1]
JSON_PIECES = [b'"', b"{", b"}", b"[", b"]", b",", b":", b"-", b"1e999", b"true", b"null", b"[[[[", b"9" * 30]
JSON_PIECES += [
    b"18446744073709551616",
    b'"__metadata__":',
    b'"dtype":',
    b'"../x.safetensors"',
    b"\\u0000",
    b"\xff",
]

# Opening fetches the file once and copies it twice; parsed, a byte of header becomes some ten bytes of Python
# objects; a block of 4.5 bits becomes floats. On top the traceback, the modules' caches and messages.
MAX_MEMORY_FACTOR = 16
MAX_MEMORY_BYTES = 256 * 1024


def write_gguf(folder: Path) -> Path:
    path = folder / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("llama.block_count", 2)
    writer.add_float32("llama.eps", 1e-5)
    writer.add_bool("flag", True)
    writer.add_array("tokens", ["a", "bc", "déf", ""])
    writer.add_array("scores", [0.0, -1.0, 2.5])
    generator = np.random.default_rng(0)
    tensors = [
        ("a", (4, 32), "Q4_0"),
        ("b", (3, 32), "Q8_0"),
        ("c", (5,), "F32"),
        ("d", (2, 32), "Q5_1"),
    ]
    for name, shape, kind in tensors:
        quantised = gguf.GGMLQuantizationType[kind]
        values = gguf.quantize(generator.standard_normal(shape, dtype=np.float32), quantised)
        writer.add_tensor(name, values, raw_dtype=quantised)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_safetensors(folder: Path) -> Path:
    (folder / "config.json").write_text("{}")
    path = folder / "model.safetensors"
    tensors = {"a": torch.ones(4, 3), "b": torch.ones(5).bfloat16(), "c": torch.ones(2, 2, dtype=torch.int8)}
    save_file(tensors, path, metadata={"format": "pt"})
    return path


def write_index(folder: Path) -> Path:
    (folder / "config.json").write_text("{}")
    names = [f"model-0000{index}-of-00002.safetensors" for index in (1, 2)]
    for index, name in enumerate(names):
        save_file({f"w{index}": torch.ones(3)}, folder / name)
    path = folder / "model.safetensors.index.json"
    path.write_text(
        json.dumps({"metadata": {"total_size": 24}, "weight_map": {"w0": names[0], "w1": names[1]}})
    )
    return path


def write_config(folder: Path) -> Path:
    write_safetensors(folder)
    path = folder / "config.json"
    path.write_text(
        json.dumps({"model_type": "llama", "rope_parameters": {"rope_theta": 1e5}, "ids": [1, 2]})
    )
    return path


WRITERS: dict[str, Callable[[Path], Path]] = {
    "gguf": write_gguf,
    "safetensors": write_safetensors,
    "index": write_index,
    "config": write_config,
}


def mutate(data: bytes, generator: random.Random) -> bytes:
    """Return `data` with one to three kinds of damage, most of it in the first two thirds."""
    damaged = bytearray(data)
    for _ in range(generator.choice([1, 1, 1, 2, 3])):
        at = generator.randrange(max(1, len(damaged) * 2 // 3)) if generator.random() < 0.9 else len(damaged)
        length = generator.randrange(1, 24)
        match generator.randrange(8):
            case 0:
                damaged[at : at + 1] = bytes([generator.randrange(256)])
            case 1:
                damaged[at : at + 8] = struct.pack("<Q", generator.choice(EXTREMES))
            case 2:
                damaged[at : at + 4] = struct.pack("<I", generator.choice(EXTREMES) % 2**32)
            case 3:
                del damaged[generator.randrange(len(damaged) + 1) :]
            case 4:
                del damaged[at : at + length]
            case 5:
                damaged[at:at] = damaged[at : at + length]
            case 6:
                damaged[at:at] = generator.choice(JSON_PIECES)
            case _:
                damaged[at : at + length] = generator.randbytes(length)
    return bytes(damaged)


def open_and_read(path: Path) -> bool:
    """Return whether the model opened; every tensor that can be read is."""
    model = path if path.suffix == ".gguf" else path.parent
    checkpoint, message = None, ""
    try:
        checkpoint = open_checkpoint(model)
    except CheckpointError as error:
        message = str(error)
    assert len(message) < 2000
    if checkpoint is None:
        return False
    try:
        for tensor in checkpoint.tensors():
            assert tensor.read_all().shape == tensor.shape
    finally:
        checkpoint.close()
    return True


def fuzz(path: Path, *, count: int, seed: int) -> int:
    """Damage the file `count` times; return how many of the damaged files still opened."""
    generator, original, num_opened = random.Random(seed), path.read_bytes(), 0
    assert open_and_read(path)
    tracemalloc.start()
    try:
        for index in range(count):
            path.write_bytes(data := mutate(original, generator))
            tracemalloc.reset_peak()
            before, start = tracemalloc.get_traced_memory()[0], time.process_time()
            try:
                num_opened += open_and_read(path)
            except Exception as error:
                raise AssertionError(f"mutation {index} of seed {seed}: {data!r}") from error
            peak = tracemalloc.get_traced_memory()[1] - before
            assert peak < MAX_MEMORY_BYTES + MAX_MEMORY_FACTOR * len(data), (index, peak, len(data))
            assert time.process_time() - start < 1.0, (index, seed)
    finally:
        tracemalloc.stop()
    return num_opened


@pytest.mark.parametrize("target", WRITERS)
def test_damaged_files_end_in_our_error(target: str, tmp_path: Path) -> None:
    num_opened = fuzz(WRITERS[target](tmp_path), count=300, seed=1)
    # Damage that hits values alone leaves a valid file; were all or none to open, this would prove little.
    assert 0 < num_opened < 200


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("target", WRITERS)
def test_ten_thousand_damaged_files_end_in_our_error(target: str, tmp_path: Path) -> None:
    assert 0 < fuzz(WRITERS[target](tmp_path), count=10_000, seed=2) < 7000
