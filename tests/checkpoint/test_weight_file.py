"""Only regular files are opened, and a file that changes under us is an error, never a crash."""

from __future__ import annotations

import os
import stat
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from slipstream.checkpoint import weight_file
from slipstream.checkpoint.weight_file import WeightFile, shown, view_bytes
from slipstream.core.errors import CheckpointError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "weights"
    path.write_bytes(bytes(range(256)))
    return path


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_reads_ranges_into_fresh_writable_buffers(path: Path) -> None:
    file = WeightFile(path)
    first, second = file.read(3, 4), file.read(3, 4)
    assert first.tolist() == [3, 4, 5, 6] and first.dtype == np.uint8
    first[:] = 0
    assert second.tolist() == [3, 4, 5, 6]
    assert file.read_bytes(255, 1) == b"\xff" and file.read(256, 0).size == 0


@pytest.mark.parametrize(
    ("offset", "num_bytes"), [(0, 257), (256, 1), (-1, 2), (4, -1), (2**63, 1), (0, 2**63)]
)
def test_a_range_outside_the_file_allocates_nothing(path: Path, offset: int, num_bytes: int) -> None:
    with pytest.raises(CheckpointError, match="256"):
        WeightFile(path).read(offset, num_bytes)


def test_reads_go_on_after_a_partial_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole_read = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, views, offset: whole_read(fd, [views[0][:7]], offset))
    assert WeightFile(path).read_bytes(0, 256) == bytes(range(256))


@pytest.mark.parametrize("size", [0, 100, 300])
def test_a_file_that_changes_its_size_is_refused(path: Path, size: int) -> None:
    file = WeightFile(path)
    os.truncate(path, size)
    with pytest.raises(CheckpointError, match=f"changed while being read.*256.*{size}"):
        file.read(0, 50)


def test_a_file_that_is_rewritten_in_place_is_refused(path: Path) -> None:
    file = WeightFile(path)
    with path.open("r+b") as writer:
        writer.write(b"other")
    os.utime(path, ns=(time.time_ns(), time.time_ns() + 10**9))
    with pytest.raises(CheckpointError, match="changed while being read"):
        file.read(0, 50)


def test_a_file_that_ends_during_the_read_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "preadv", lambda fd, views, offset: 0)
    with pytest.raises(CheckpointError, match="changed while being read: it ended early"):
        WeightFile(path).read(0, 50)


def test_an_io_error_is_reported_with_the_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(fd: int, views: object, offset: int) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", failing)
    with pytest.raises(CheckpointError, match=r"weights.*Input/output error"):
        WeightFile(path).read(0, 50)


def test_reading_a_closed_file_is_refused_and_closing_twice_is_not(path: Path) -> None:
    before = open_descriptors()
    file = WeightFile(path)
    assert open_descriptors() == before + 1
    file.close()
    file.close()
    assert open_descriptors() == before
    with pytest.raises(CheckpointError, match="closed"):
        file.read(0, 1)


@pytest.mark.timeout(10)
@pytest.mark.parametrize(("kind", "said"), [("fifo", "FIFO"), ("folder", "directory"), ("device", "device")])
def test_only_regular_files_are_opened(tmp_path: Path, kind: str, said: str) -> None:
    path = Path("/dev/zero") if kind == "device" else tmp_path / kind
    if kind == "fifo":
        os.mkfifo(path)
    if kind == "folder":
        path.mkdir()
    with pytest.raises(CheckpointError, match=said):
        WeightFile(path)


@pytest.mark.timeout(10)
@pytest.mark.parametrize("kind", ["fifo", "folder"])
def test_a_file_swapped_between_look_and_open_is_refused(
    path: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    swapped, regular, before = tmp_path / kind, os.stat(path), open_descriptors()
    os.mkfifo(swapped) if kind == "fifo" else swapped.mkdir()
    monkeypatch.setattr(weight_file.os, "stat", lambda _: regular)
    assert stat.S_ISREG(os.stat(swapped).st_mode)
    with pytest.raises(CheckpointError, match="regular file"):
        WeightFile(swapped)
    assert open_descriptors() == before


@pytest.mark.parametrize("name", ["absent", "nul\0byte", "x" * 300])
def test_a_path_that_cannot_be_opened_says_so(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match="cannot be opened"):
        WeightFile(f"{tmp_path}/{name}")


def test_shown_is_short_whatever_the_value() -> None:
    deep: list[object] = []
    for _ in range(100_000):
        deep = [deep]
    for value in ["x" * 10**6, b"y" * 10**6, [0] * 10**6, {str(i): i for i in range(1000)}, 9**4000, deep]:
        assert len(shown(value)) < 400


def test_view_bytes_aliases_and_views_nothing_at_all() -> None:
    raw = np.arange(8, dtype=np.uint8)
    viewed = view_bytes(raw, torch.int32)
    raw[:] = 0
    assert viewed.tolist() == [0, 0]
    assert view_bytes(raw[:0], torch.float32).shape == (0,)
