"""Do the matrix kernels compute the same bits on every instruction set? Products, packing, exp and tanh.

A small program is compiled for each and its output compared. Arm's runs in an emulator where this machine is
none: it needs `qemu-aarch64` and either `aarch64-linux-gnu-g++` or the `ziglang` package.
"""

from __future__ import annotations

import importlib.util
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from slipstream.kernels.cpu.build import SOURCES, find_compilers
from slipstream.kernels.cpu.instruction_sets import (
    INSTRUCTION_SETS,
    SHARED_FLAGS,
    InstructionSet,
    usable_sets,
)
from slipstream.kernels.cpu.library import LibraryUnavailable

PROGRAM = Path(__file__).with_name("print_results.cpp")
NEON = next(s for s in INSTRUCTION_SETS if s.name == "neon")
# Without the dot-product extension, which the first 64-bit Arm cores lack.
OLD_NEON_FLAGS = ("-march=armv8-a",)
CASES = 14


def native_results(folder: Path, instructions: InstructionSet) -> str:
    compilers = find_compilers()
    if not compilers:
        pytest.skip("no C++ compiler here")
    program = folder / f"results-{instructions.name}"
    command = [*compilers[0].command, *compilers[0].flags(instructions)]
    return compiled_output([*command, "-o", str(program)], [str(program)])


def compiled_output(command: list[str], program: list[str]) -> str:
    arguments = [*command, "-I", str(SOURCES), str(PROGRAM)]
    subprocess.run(arguments, check=True, timeout=280, capture_output=True)
    done = subprocess.run(program, check=True, timeout=280, capture_output=True, text=True)
    assert len(done.stdout.splitlines()) == CASES
    return done.stdout


def usable() -> list[InstructionSet]:
    try:
        return usable_sets()
    except LibraryUnavailable as error:
        pytest.skip(f"no CPU kernels here: {error.reason}")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_this_cpu_agrees_with_itself(tmp_path: Path) -> None:
    sets = usable()
    if len(sets) < 2:
        pytest.skip(f"this CPU runs only {sets[0].name}")
    best, *others = (native_results(tmp_path, instructions) for instructions in sets)
    assert all(other == best for other in others)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("flags", [NEON.flags, OLD_NEON_FLAGS], ids=["dot-product", "first-generation"])
def test_arm_agrees_with_this_cpu(tmp_path: Path, flags: tuple[str, ...]) -> None:
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("this machine is not an x86 one to compare with")
    emulator = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
    if emulator is None:
        pytest.skip("qemu-aarch64 is not installed (Debian: qemu-user)")
    program = tmp_path / "results-arm"
    command = [*cross_compiler(), *SHARED_FLAGS, *flags, "-static", "-o", str(program)]
    assert compiled_output(command, [emulator, str(program)]) == native_results(tmp_path, usable()[0])


def cross_compiler() -> list[str]:
    gcc = shutil.which("aarch64-linux-gnu-g++")
    if gcc is not None:
        return [gcc]
    if importlib.util.find_spec("ziglang") is None:
        pytest.skip("neither aarch64-linux-gnu-g++ nor the ziglang package is installed")
    return [
        sys.executable,
        "-m",
        "ziglang",
        "c++",
        "-target",
        "aarch64-linux-musl",
        "-fno-sanitize=undefined",
    ]
