"""Is a compiler found in order, told the right things, and survived when it fails or hangs?"""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from slipstream.kernels.cpu import build
from slipstream.kernels.cpu.build import BuildError, Compiler, compile_library, compiler_key, source_key
from slipstream.kernels.cpu.instruction_sets import INSTRUCTION_SETS, SHARED_FLAGS

AVX512, AVX2, NEON = INSTRUCTION_SETS
posix_only = pytest.mark.skipif(sys.platform == "win32", reason="the pretended compilers are shell scripts")


def script(folder: Path, name: str, text: str = "exit 0") -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
    path.chmod(0o755)
    return path


@pytest.fixture
def bin_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A PATH of one empty folder, no CXX and no Zig."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    return folder


def sources_of(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / build.UNIT).write_text('extern "C" int ss_answer() { return 42; }\n', encoding="utf-8")
    return folder


@posix_only
def test_order_of_compilers(bin_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert build.find_compilers() == []
    clang, gcc = script(bin_folder, "clang++"), script(bin_folder, "g++")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace(origin=str(gcc)))
    found = build.find_compilers()
    assert [c.command[0] for c in found] == [str(gcc), str(clang), sys.executable]
    assert [c.is_zig for c in found] == [False, False, True]


@posix_only
def test_cxx_is_used_alone_with_its_arguments(bin_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script(bin_folder, "g++")
    mine = script(bin_folder, "my cxx")
    monkeypatch.setenv("CXX", f"'{mine}' -m64")
    assert [c.command for c in build.find_compilers()] == [(str(mine), "-m64")]
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert build.find_compilers() == []


def test_zig_is_told_in_its_own_words() -> None:
    gcc = Compiler(command=("g++",), identity="1")
    zig = Compiler(command=("zig", "c++"), identity="1", is_zig=True)
    assert gcc.flags(NEON) == (*SHARED_FLAGS, "-march=armv8.2-a+dotprod+fp16")
    assert not any(flag.startswith("-march") for flag in zig.flags(NEON))
    assert gcc.flags(AVX2)[-4:] == ("-mavx2", "-mfma", "-mf16c", "-mbmi2")
    assert gcc.flags(AVX512)[-2:] == ("-march=x86-64-v4", "-mavx512vnni")


def test_key_changes_with_all_that_decides_the_bytes(tmp_path: Path) -> None:
    sources = sources_of(tmp_path)
    key = source_key(sources)
    assert source_key(sources) == key
    (sources / "notes.txt").write_text("not compiled", encoding="utf-8")
    assert source_key(sources) == key
    (sources / "a.h").write_text("1", encoding="utf-8")
    with_header = source_key(sources)
    (sources / "a.h").rename(sources / "b.h")
    renamed = source_key(sources)
    assert len({key, with_header, renamed, source_key(sources, ("-O2",))}) == 4
    gcc = Compiler(command=("g++",), identity="1")
    updated = Compiler(command=("g++",), identity="2")
    keys = {compiler_key(c, s) for c in (gcc, updated) for s in INSTRUCTION_SETS}
    assert len(keys) == 6


@posix_only
def test_an_updated_compiler_is_another_one(bin_folder: Path) -> None:
    path = script(bin_folder, "g++")
    (before,) = build.find_compilers()
    path.write_text("#!/bin/sh\n# a newer one\nexit 0\n", encoding="utf-8")
    (after,) = build.find_compilers()
    assert before.identity != after.identity


@posix_only
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("echo 'error: no such flag' >&2; exit 3", r"status 3:\nerror: no such flag"),
        ("exit 0", "status 0:\nno output"),
        (r"printf '\377\n'; exit 1", "\ufffd"),
    ],
)
def test_what_a_failing_compiler_said_is_kept(tmp_path: Path, text: str, said: str) -> None:
    compiler = Compiler(command=(str(script(tmp_path / "bin", "cxx", text)),), identity="")
    with pytest.raises(BuildError, match=said):
        compile_library(compiler, AVX2, tmp_path / "a.so", sources=sources_of(tmp_path / "src"))


def test_a_compiler_that_cannot_start_is_an_error_of_the_build(tmp_path: Path) -> None:
    compiler = Compiler(command=(str(tmp_path / "missing"),), identity="")
    with pytest.raises(BuildError, match="cannot be started"):
        compile_library(compiler, AVX2, tmp_path / "a.so", sources=sources_of(tmp_path / "src"))


@posix_only
def test_a_hanging_compiler_and_its_children_are_killed(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    text = f"sleep 600 &\necho $! > '{pid_file}'\nwait"
    compiler = Compiler(command=(str(script(tmp_path / "bin", "cxx", text)),), identity="")
    with pytest.raises(BuildError, match="did not end within 1 s"):
        compile_library(
            compiler, AVX2, tmp_path / "a.so", sources=sources_of(tmp_path / "src"), time_limit_s=1.0
        )
    child = int(pid_file.read_text(encoding="ascii"))
    deadline = time.monotonic() + 10
    while is_running(child) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not is_running(child)


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")
    # A child that nobody has collected yet still has a number.
    return not (status.exists() and status.read_text(encoding="ascii").rpartition(")")[2].split()[0] == "Z")
