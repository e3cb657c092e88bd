"""Do the kernel sources of this package become a library here, and does the engine do without one?"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from slipstream.kernels.cpu import library as library_file
from slipstream.kernels.cpu.build import find_compilers
from slipstream.kernels.cpu.instruction_sets import usable_sets
from slipstream.kernels.cpu.library import LibraryUnavailable

ROOT = Path(__file__).resolve().parents[3]
needs_compiler = pytest.mark.skipif(not find_compilers(), reason="no C++ compiler on this machine")


def run_python(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **variables}
    environment.pop("CXX", None)
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_without_any_compiler_the_engine_still_imports(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    result = run_python(
        """
        import sys
        sys.modules["ziglang"] = None  # as if it were not installed
        from slipstream import LLM
        from slipstream.kernels.cpu import library
        from slipstream.kernels.cpu.library import LibraryUnavailable
        library.PREBUILT = library.SOURCES / "nowhere"
        for _ in range(2):
            try:
                library.library()
            except LibraryUnavailable as error:
                print(error.reason)
                print(error.fix)
        """,
        PATH=str(empty),
        SLIPSTREAM_KERNEL_CACHE=str(tmp_path / "cache"),
    )
    assert result.returncode == 0, result.stderr
    reason, fix, *again = result.stdout.splitlines()
    assert "no C++ compiler" in reason
    assert "pip install" in fix
    assert again == [reason, fix]


@needs_compiler
def test_the_sources_build_and_load_once() -> None:
    assert library_file.library() is library_file.library()
    assert library_file.instruction_set() == usable_sets()[0].name


def test_the_instruction_set_can_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIPSTREAM_CPU_INSTRUCTIONS", "sse2")
    with pytest.raises(LibraryUnavailable, match="'sse2' and this CPU runs"):
        library_file.library()
