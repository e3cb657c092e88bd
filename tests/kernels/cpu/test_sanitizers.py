"""Do the C++ kernels read and write only what is theirs, and do nothing that C++ leaves undefined?

GCC's address and undefined-behaviour sanitizers end the process at the first violation.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from slipstream.kernels.cpu import library_cache
from slipstream.kernels.cpu.build import SOURCES, compile_library, find_compilers, library_suffix, source_key
from slipstream.kernels.cpu.instruction_sets import usable_sets
from slipstream.kernels.cpu.library import cache_name

ROOT = Path(__file__).resolve().parents[3]
FLAGS = "-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g1"
# What builds libraries of its own, or runs this.
NOT_KERNELS = {
    "test_build",
    "test_library",
    "test_library_cache",
    "test_shipped_library",
    "test_sanitizers",
    "test_wheels",
}
GCC = shutil.which("g++")
needs_gcc = pytest.mark.skipif(
    GCC is None or sys.platform != "linux", reason="the sanitizers' libraries are found by g++ on Linux"
)


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process whose kernel library is built with sanitizers."""
    variables = {
        # The sanitizers are preloaded; a compiler would run ten times slower with them.
        "CXX": f"env -u LD_PRELOAD {GCC} {FLAGS}",
        "SLIPSTREAM_KERNEL_CACHE": str(tmp_path_factory.mktemp("sanitized")),
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        build_library()
    return {
        **os.environ,
        **variables,
        # They have to be there before anything else allocates, and the C++ library before they look for the
        # functions that throw.
        "LD_PRELOAD": " ".join(runtime(name) for name in ("libasan.so", "libubsan.so", "libstdc++.so")),
        # Python gives back little of what it has at its end.
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "OMP_NUM_THREADS": "2",
    }


def build_library() -> None:
    """Put a library where the processes find it; loading it into this one would end it."""
    (compiler,), instructions = find_compilers(), usable_sets()[0]
    build = functools.partial(
        # Checks make the compiler slow; with less to optimise it takes a minute.
        compile_library,
        compiler,
        instructions,
        extra_flags=("-O1",),
        time_limit_s=3000,
    )
    name = cache_name(instructions, source_key(SOURCES), compiler)
    library_cache.add(library_cache.cache_folder(), name, suffix=library_suffix(), build=build)


def runtime(name: str) -> str:
    assert GCC is not None
    found = subprocess.run([GCC, f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    return found.stdout.strip()


def run(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


@needs_gcc
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("num_threads", [1, 3])
def test_ragged_sizes(sanitized: dict[str, str], num_threads: int) -> None:
    result = run(sanitized, "-m", "tests.kernels.cpu.ragged_sizes", str(num_threads))
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout == "every size ran\n"


@needs_gcc
@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_kernel_tests(sanitized: dict[str, str]) -> None:
    files = sorted(Path(__file__).parent.glob("test_*.py"))
    kernel_tests = [str(path) for path in files if path.stem not in NOT_KERNELS]
    assert kernel_tests
    result = run(sanitized, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-x", *kernel_tests)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-8000:]


@needs_gcc
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_sanitizer_sees_a_short_buffer(sanitized: dict[str, str]) -> None:
    code = """
import ctypes
from slipstream.kernels.cpu.library import library
from tests.kernels.cpu.ragged_sizes import Memory
native = library()
x, best = Memory(4 * 8), Memory(8)
x.view("f4")[:] = 0
native.ss_argmax(x.address, 1, 9, best.address)
"""
    result = run(sanitized, "-c", code)
    assert result.returncode != 0
    assert "heap-buffer-overflow" in result.stderr
