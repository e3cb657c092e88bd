"""Our reader agrees with the safetensors library on good files and refuses bad ones quickly and by name.

Seconds are CPU time, so that a busy machine does not fail a test; what blocks meets the suite's timeout.
"""

from __future__ import annotations

import json
import os
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from slipstream.checkpoint.safetensors_reader import DTYPES, MAX_HEADER_BYTES, SafetensorsFile
from slipstream.core.errors import CheckpointError


def write(path: Path, header: Any, data: bytes = b"", *, header_bytes: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(raw) if header_bytes is None else header_bytes).to_bytes(8, "little") + raw + data)
    return path


def entry(dtype: Any = "F32", shape: Any = (2, 2), begin: Any = 0, end: Any = 16) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def random_tensor(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    raw = torch.randint(0, 256, (*shape, dtype.itemsize), dtype=torch.uint8)
    return raw[..., 0] > 127 if dtype is torch.bool else raw.view(dtype).reshape(shape)


def test_every_dtype_and_shape_reads_as_it_was_saved(tmp_path: Path) -> None:
    torch.manual_seed(0)
    shapes = {
        "matrix": (5, 3),
        "cube": (2, 3, 4),
        "vector": (7,),
        "scalar": (),
        "empty": (0, 4),
        "thin": (4, 0),
    }
    saved = {
        f"{name}.{dtype}": random_tensor(torch_dtype, shape)
        for name, shape in shapes.items()
        for dtype, torch_dtype in DTYPES.items()
        if dtype != "F8_E8M0"  # the library's writer has no such type; its bytes are tested below
    }
    save_file(saved, tmp_path / "x.safetensors", metadata={"format": "pt"})
    file = SafetensorsFile(tmp_path / "x.safetensors")
    assert sorted(file.tensor_names()) == sorted(saved)
    for tensor in file.tensors():
        expected, found = saved[tensor.name], tensor.read_all()
        assert found.dtype == expected.dtype and tensor.dtype == tensor.name.split(".")[1]
        assert found.shape == expected.shape == tensor.shape and tensor.num_bytes == expected.nbytes
        # As bytes: NaN differs from itself and float8 has no equality.
        assert found.reshape(-1).view(torch.uint8).equal(expected.reshape(-1).view(torch.uint8))


def test_scale_bytes_of_microscaling_formats_are_powers_of_two(tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", {"s": entry("F8_E8M0", [3], 0, 3)}, bytes([126, 127, 128]))
    assert next(SafetensorsFile(path).tensors()).read_all().float().tolist() == [0.5, 1.0, 2.0]


def test_every_range_of_rows_is_that_range_of_the_whole(tmp_path: Path) -> None:
    values = torch.randn(6, 2, 5, generator=torch.Generator().manual_seed(0)).bfloat16()
    save_file({"w": values}, tmp_path / "x.safetensors")
    tensor = next(SafetensorsFile(tmp_path / "x.safetensors").tensors())
    for start in range(7):
        for stop in range(start, 7):
            assert torch.equal(tensor.read(start, stop), values[start:stop])
    for start, stop in [(-1, 2), (0, 7), (4, 3)]:
        with pytest.raises(IndexError, match="w has rows 0 to 6"):
            tensor.read(start, stop)


def test_truthy_bytes_become_true(tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", {"m": entry("BOOL", [3], 0, 3)}, b"\x00\x01\x80")
    assert next(SafetensorsFile(path).tensors()).read_all().tolist() == [False, True, True]


TWO = {"a": entry(begin=0, end=16), "b": entry(begin=16, end=32)}
DEEP = b'{"a":' * 50_000 + b"1" + b"}" * 50_000

HOSTILE: dict[str, tuple[Any, int, str]] = {
    # header, bytes of data, what the message says
    "not json": (b"{nonsense", 16, "not valid JSON"),
    "not utf-8": (b'{"\xff": 1}', 16, "not valid JSON"),
    "nested": (DEEP, 16, "nested too deeply"),
    "list": (b"[]", 16, "does not begin with"),
    "leading space": (b" {}", 16, "does not begin with"),
    "empty": (b"", 16, "does not begin with"),
    "no tensors, data": ({}, 16, "16 bytes after the header"),
    "tensor twice": (b'{"a": 1, "a": 2}', 16, "'a' appears twice"),
    "field twice": (b'{"a": {"dtype": "F32", "dtype": "F16"}}', 16, "'dtype' appears twice"),
    "metadata number": ({"__metadata__": {"format": 1}}, 0, "__metadata__"),
    "metadata list": ({"__metadata__": []}, 0, "__metadata__"),
    "no entry": ({"a": None}, 16, "tensor 'a' is None"),
    "entry list": ({"a": [1]}, 16, "tensor 'a'"),
    "missing field": ({"a": {"dtype": "F32", "shape": [4]}}, 16, "tensor 'a'.*needed"),
    "extra field": ({"a": entry() | {"url": "x"}}, 16, "tensor 'a'.*needed"),
    "unknown dtype": ({"a": entry("F31")}, 16, "'a' has dtype 'F31'; supported: F64, F32"),
    "dtype list": ({"a": entry(["F32"])}, 16, r"'a' has dtype \['F32'\]"),
    "dtype null": ({"a": entry(None)}, 16, "'a' has dtype None"),
    "negative size": ({"a": entry(shape=[-2, -2])}, 16, "'a' has shape"),
    "size true": ({"a": entry(shape=[4, True])}, 16, "'a' has shape"),
    "size float": ({"a": entry(shape=[4.0])}, 16, "'a' has shape"),
    "size 2^63": ({"a": entry(shape=[2**63])}, 16, "'a' has shape"),
    "size 10^4000": (
        b'{"a": {"dtype": "F32", "shape": [1%s], "data_offsets": [0, 16]}}' % (b"0" * 4000),
        16,
        "'a' has",
    ),
    "product overflows": (
        {"a": entry(shape=[2**62, 16])},
        16,
        "'a', F32 .*needs 295147905179352825856 bytes",
    ),
    "product overflows to 16": ({"a": entry(shape=[2**32, 2**32 + 1])}, 16, "'a', F32 .*needs"),
    "shape text": ({"a": entry(shape="4")}, 16, "'a' has shape '4'"),
    "too many sizes": ({"a": entry(shape=[1] * 17)}, 16, "'a' has shape"),
    "shape too small": ({"a": entry(shape=[3])}, 16, "'a', F32 .*needs 12 bytes; its offsets span 16"),
    "dtype too small": ({"a": entry("F16")}, 16, "'a', F16 .*needs 8 bytes; its offsets span 16"),
    "offset negative": ({"a": entry(begin=-16, end=0)}, 16, "'a' has data_offsets"),
    "offset reversed": ({"a": entry(begin=16, end=0)}, 16, "'a' has data_offsets"),
    "offset text": ({"a": entry(begin="0")}, 16, "'a' has data_offsets"),
    "three offsets": ({"a": entry() | {"data_offsets": [0, 16, 16]}}, 16, "'a' has data_offsets"),
    "past the end": ({"a": entry()}, 15, "'a' ends at byte 16 of 15"),
    "far past the end": ({"a": entry(shape=[2**60], end=2**62)}, 16, "'a' ends at byte 4611686018427387904"),
    "overlap": (TWO | {"b": entry(begin=12, end=28)}, 28, "'b' overlaps 'a'"),
    "same place": ({"a": entry(), "b": entry()}, 16, "overlaps"),
    "gap": (TWO | {"b": entry(begin=20, end=36)}, 36, "'b' leaves a gap after 'a'"),
    "gap at the front": ({"a": entry(begin=4, end=20)}, 20, "'a' leaves a gap after the header"),
    "data left over": (TWO, 33, "1 bytes after 'b'"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_header_is_refused_by_name_and_fast(case: str, tmp_path: Path) -> None:
    header, num_bytes, said = HOSTILE[case]
    path = write(tmp_path / "bad.safetensors", header, bytes(num_bytes))
    before, start = len(os.listdir("/proc/self/fd")), time.process_time()
    with pytest.raises(CheckpointError, match=said) as caught:
        SafetensorsFile(path)
    assert time.process_time() - start < 1.0
    assert "bad.safetensors" in str(caught.value) and len(str(caught.value)) < 1000
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("header_bytes", [1000, 2**31, MAX_HEADER_BYTES + 1, 2**63, 2**64 - 1])
def test_a_header_longer_than_the_file_allocates_nothing(header_bytes: int, tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", {"a": entry()}, bytes(16), header_bytes=header_bytes)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=f"header length is {header_bytes}; allowed: at most"):
            SafetensorsFile(path)
        # 64 kB covers the traceback and the message; the file is 100 bytes.
        assert tracemalloc.get_traced_memory()[1] < 64 * 1024
    finally:
        tracemalloc.stop()


def test_a_header_beyond_the_cap_is_refused_though_it_fits(tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", {"a": entry()}, header_bytes=MAX_HEADER_BYTES + 1)
    os.truncate(path, 2 * MAX_HEADER_BYTES)  # sparse
    with pytest.raises(CheckpointError, match=f"allowed: at most {MAX_HEADER_BYTES}"):
        SafetensorsFile(path)


def test_a_valid_file_is_cut_at_every_byte(tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", TWO, bytes(32))
    whole = path.read_bytes()
    assert SafetensorsFile(path).tensor_names() == ["a", "b"]
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError):
            SafetensorsFile(path)


def test_truncation_while_reading_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", TWO, bytes(32))
    tensors = list(SafetensorsFile(path).tensors())
    assert tensors[1].read_all().shape == (2, 2)
    os.truncate(path, path.stat().st_size - 4)
    for tensor in tensors:
        with pytest.raises(CheckpointError, match="changed while being read"):
            tensor.read_all()
