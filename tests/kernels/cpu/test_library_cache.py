"""Is a kept library loaded only while it is what was built, and this user's own?"""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path

import pytest

from slipstream.kernels.cpu import library_cache

NAME = "slipstream_cpu-0-avx2-k"


@pytest.fixture(autouse=True)
def no_kernel_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests' own setting would hide the folder's usual place."""
    monkeypatch.delenv("SLIPSTREAM_KERNEL_CACHE", raising=False)


def keep(folder: Path, content: bytes = b"code", name: str = NAME) -> Path:
    return library_cache.add(
        folder, name, suffix=".so", build=lambda path: path.write_bytes(content) and None
    )


def test_what_was_added_is_found_and_private(tmp_path: Path) -> None:
    library = keep(tmp_path)
    assert library_cache.find(tmp_path, NAME) == library
    assert library.read_bytes() == b"code"
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".sha256", ".so"]
    if sys.platform != "win32":
        assert all(stat.S_IMODE(p.stat().st_mode) & 0o077 == 0 for p in tmp_path.iterdir())


def test_another_build_takes_the_place_of_the_first(tmp_path: Path) -> None:
    first, second = keep(tmp_path, b"one"), keep(tmp_path, b"two")
    assert first != second
    assert library_cache.find(tmp_path, NAME) == second


def test_a_damaged_library_is_not_found_and_a_build_mends_it(tmp_path: Path) -> None:
    library = keep(tmp_path)
    library.write_bytes(b"c0de")
    assert library_cache.find(tmp_path, NAME) is None
    assert keep(tmp_path) == library
    assert library_cache.find(tmp_path, NAME) == library


@pytest.mark.parametrize(
    "record",
    [
        "",
        "0" * 64,
        f"{'0' * 64}  {NAME}.so\n",
        # A record names a file beside it and nothing else.
        f"{'0' * 64}  ../{NAME}.so\n",
        f"{'0' * 64}  /etc/passwd\n",
        "\u00e9",
    ],
)
def test_a_damaged_record_is_not_believed(tmp_path: Path, record: str) -> None:
    keep(tmp_path)
    (tmp_path / f"{NAME}.sha256").write_text(record, encoding="utf-8")
    assert library_cache.find(tmp_path, NAME) is None


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no mode bits")
@pytest.mark.parametrize("what", [".so", ".sha256"])
@pytest.mark.parametrize("mode", [0o720, 0o702])
def test_what_others_can_write_is_not_loaded(tmp_path: Path, what: str, mode: int) -> None:
    keep(tmp_path)
    next(tmp_path.glob(f"*{what}")).chmod(mode)
    assert library_cache.find(tmp_path, NAME) is None


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no user ids")
def test_what_belongs_to_another_user_is_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep(tmp_path)
    own = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: own + 1)
    assert library_cache.find(tmp_path, NAME) is None


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no symbolic links for everyone")
def test_a_link_is_not_loaded(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "folder", tmp_path / "elsewhere"
    folder.mkdir()
    library = keep(folder)
    library.rename(elsewhere)
    library.symlink_to(elsewhere)
    assert library_cache.find(folder, NAME) is None


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    def fail(path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        library_cache.add(tmp_path, NAME, suffix=".so", build=fail)
    assert list(tmp_path.iterdir()) == []


def test_find_any_skips_what_is_damaged_or_of_other_sources(tmp_path: Path) -> None:
    keep(tmp_path, b"1", f"{NAME}-a").write_bytes(b"x")
    library = keep(tmp_path, b"2", f"{NAME}-b")
    keep(tmp_path, b"3", "slipstream_cpu-0-avx2-other-a")
    assert library_cache.find_any(tmp_path, NAME) == library
    assert library_cache.find_any(tmp_path, "slipstream_cpu-1") is None


def test_the_folder_is_in_the_cache_and_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIPSTREAM_CACHE", str(tmp_path / "cache"))
    folder = library_cache.cache_folder()
    assert folder == tmp_path / "cache" / "cpu_kernels"
    if sys.platform != "win32":
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no mode bits")
def test_a_folder_that_others_can_write_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLIPSTREAM_CACHE", str(tmp_path))
    (tmp_path / "cpu_kernels").mkdir()
    (tmp_path / "cpu_kernels").chmod(0o777)
    folder = library_cache.cache_folder()
    assert tmp_path not in folder.parents
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_a_cache_that_cannot_be_made_gives_a_folder_for_this_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    monkeypatch.setenv("SLIPSTREAM_CACHE", str(tmp_path / "file"))
    assert library_cache.cache_folder().is_dir()
