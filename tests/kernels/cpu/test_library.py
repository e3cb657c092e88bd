"""Does the library load from wherever it can be had, and say what is missing where it cannot?"""

from __future__ import annotations

import multiprocessing
import os
import shutil
from pathlib import Path

import pytest

from slipstream.kernels.cpu import library as library_file
from slipstream.kernels.cpu import library_cache
from slipstream.kernels.cpu.build import UNIT, find_compilers, library_suffix, source_key
from slipstream.kernels.cpu.instruction_sets import usable_sets
from slipstream.kernels.cpu.library import LibraryUnavailable, find_or_build, prebuilt_name

needs_compiler = pytest.mark.skipif(not find_compilers(), reason="no C++ compiler on this machine")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SLIPSTREAM_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("SLIPSTREAM_KERNEL_CACHE", raising=False)
    monkeypatch.delenv("SLIPSTREAM_CPU_INSTRUCTIONS", raising=False)
    return tmp_path / "cache" / "cpu_kernels"


def sources_of(folder: Path, value: int = 42) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    code = f'extern "C" int ss_answer() {{ return {value}; }}\n'
    (folder / UNIT).write_text(code, encoding="utf-8")
    return folder


def forbid_builds(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("nothing is to be built here")

    monkeypatch.setattr(library_file, "compile_library", refuse)


@needs_compiler
def test_the_second_time_nothing_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = sources_of(tmp_path / "src")
    first = find_or_build("", sources=sources)
    assert first.handle.ss_answer() == 42
    assert first.instructions == usable_sets()[0].name
    forbid_builds(monkeypatch)
    assert find_or_build("", sources=sources).path == first.path


@needs_compiler
def test_changed_sources_are_built_again(tmp_path: Path) -> None:
    assert find_or_build("", sources=sources_of(tmp_path / "src")).handle.ss_answer() == 42
    assert find_or_build("", sources=sources_of(tmp_path / "src", 43)).handle.ss_answer() == 43


@needs_compiler
def test_a_damaged_file_is_built_again(tmp_path: Path) -> None:
    sources = sources_of(tmp_path / "src")
    find_or_build("", sources=sources)
    (kept,) = (tmp_path / "cache" / "cpu_kernels").glob(f"*{library_suffix()}")
    content = kept.read_bytes()
    # A new file, as a crash or another program leaves it; writing into a loaded library would crash this one.
    kept.unlink()
    kept.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert find_or_build("", sources=sources).handle.ss_answer() == 42
    assert kept.read_bytes() == content


@needs_compiler
def test_an_earlier_build_serves_where_the_compiler_has_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = sources_of(tmp_path / "src")
    path = find_or_build("", sources=sources).path
    monkeypatch.setattr(library_file, "find_compilers", list)
    assert find_or_build("", sources=sources).path == path


@needs_compiler
def test_a_prebuilt_library_of_these_sources_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources, prebuilt = sources_of(tmp_path / "src"), tmp_path / "prebuilt"
    prebuilt.mkdir()
    monkeypatch.setattr(library_file, "PREBUILT", prebuilt)
    built = find_or_build("", sources=sources).path
    name = prebuilt_name(usable_sets()[0], source_key(sources), library_suffix())
    shutil.copy(built, prebuilt / name)
    forbid_builds(monkeypatch)
    assert find_or_build("", sources=sources).path == prebuilt / name


@needs_compiler
def test_a_prebuilt_library_that_does_not_load_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources, prebuilt = sources_of(tmp_path / "src"), tmp_path / "prebuilt"
    prebuilt.mkdir()
    monkeypatch.setattr(library_file, "PREBUILT", prebuilt)
    (prebuilt / prebuilt_name(usable_sets()[0], source_key(sources), library_suffix())).write_bytes(
        b"not code"
    )
    loaded = find_or_build("", sources=sources)
    assert loaded.handle.ss_answer() == 42
    assert loaded.path.parent != prebuilt


def test_no_compiler_is_told_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library_file, "find_compilers", list)
    with pytest.raises(LibraryUnavailable) as caught:
        find_or_build("", sources=sources_of(tmp_path / "src"))
    assert "no C++ compiler" in caught.value.reason
    assert "slipstream-llm[zig]" in caught.value.fix and "\n" not in caught.value.fix


@needs_compiler
def test_code_that_does_not_compile_is_shown(tmp_path: Path) -> None:
    sources = sources_of(tmp_path / "src")
    (sources / UNIT).write_text("#error not today\n", encoding="utf-8")
    with pytest.raises(LibraryUnavailable, match="no build succeeded") as caught:
        find_or_build("", sources=sources)
    assert "not today" in caught.value.reason


def test_missing_sources_are_told(tmp_path: Path) -> None:
    with pytest.raises(LibraryUnavailable, match="missing from the package"):
        find_or_build("", sources=tmp_path)


def build_in_child(sources: str, cache: str, start: object, answers: object) -> None:
    os.environ["SLIPSTREAM_CACHE"] = cache
    start.wait()  # pyright: ignore[reportAttributeAccessIssue]
    answers.put(find_or_build("", sources=Path(sources)).handle.ss_answer())  # pyright: ignore[reportAttributeAccessIssue]


@needs_compiler
def test_processes_that_build_at_once_all_get_one(tmp_path: Path, own_cache: Path) -> None:
    context = multiprocessing.get_context("spawn")
    start, answers = context.Event(), context.Queue()
    arguments = (str(sources_of(tmp_path / "src")), str(tmp_path / "cache"), start, answers)
    children = [context.Process(target=build_in_child, args=arguments) for _ in range(3)]
    for child in children:
        child.start()
    start.set()
    assert [answers.get(timeout=120) for _ in children] == [42, 42, 42]
    for child in children:
        child.join(timeout=60)
        assert child.exitcode == 0
    (record,) = own_cache.glob("*.sha256")
    assert library_cache.find(own_cache, record.name.removesuffix(".sha256")) is not None
    assert not list(own_cache.glob("build-*"))
