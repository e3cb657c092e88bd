"""How does C++ source become a library on this machine? Compilers are looked for in order, and may fail.

Invariant: what a build is named for decides its bytes: the key hashes the sources, the flags and the identity
of the compiler. A compiler runs with a list of arguments, a deadline and no input, in a process group of its
own that is killed whole; its output is kept for the error.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from slipstream.core import env
from slipstream.kernels.cpu.instruction_sets import SHARED_FLAGS, InstructionSet

SOURCES = Path(__file__).parent / "src"
UNIT = "slipstream_cpu.cpp"
# The first build by Zig compiles its C++ library too: 51 s on two cores.
TIME_LIMIT_S = 300.0
SUFFIXES = {"darwin": ".dylib", "win32": ".dll"}
_SHOWN_LINES = 12
HOW_TO_GET_A_COMPILER = (
    "Install a C++ compiler (g++ or clang++), or `pip install 'slipstream-llm[zig]'`, which needs no system "
    "package."
)


class BuildError(Exception):
    """A compiler did not produce a library; the message ends with the last lines it wrote."""


@dataclass(frozen=True, kw_only=True)
class Compiler:
    """A command that takes the arguments of GCC. `identity` changes when another version is installed."""

    command: tuple[str, ...]
    identity: str
    is_zig: bool = False

    def flags(self, instructions: InstructionSet) -> tuple[str, ...]:
        if self.is_zig:
            # Zig turns the undefined-behaviour checks on by itself.
            return (*SHARED_FLAGS, *instructions.zig_flags, "-fno-sanitize=undefined")
        return (*SHARED_FLAGS, *instructions.flags)


def find_compilers() -> list[Compiler]:
    """Return what can compile here, in order: `$CXX` alone where it is set, else g++, clang++, Zig."""
    chosen = shlex.split(env.cxx())
    if chosen:
        program = shutil.which(chosen[0])
        return [] if program is None else [_system_compiler(program, *chosen[1:])]
    programs = [path for name in ("g++", "clang++") if (path := shutil.which(name)) is not None]
    found = [_system_compiler(path) for path in programs]
    zig = importlib.util.find_spec("ziglang")
    if zig is not None and zig.origin is not None:
        command = (sys.executable, "-m", "ziglang", "c++")
        found.append(Compiler(command=command, identity=_file_identity(zig.origin), is_zig=True))
    return found


def _system_compiler(program: str, *arguments: str) -> Compiler:
    return Compiler(command=(program, *arguments), identity=_file_identity(program))


def _file_identity(path: str) -> str:
    # Asking for its version would cost every start a process; an upgrade changes size and time.
    real = os.path.realpath(path)
    status = os.stat(real)
    return f"{real} {status.st_size} {status.st_mtime_ns}"


def source_key(sources: Path, flags: Sequence[str] = SHARED_FLAGS) -> str:
    """Return a hash of every source file and of the flags."""
    digest = hashlib.sha256()
    for path in sorted(p for p in sources.rglob("*") if p.suffix in (".cpp", ".h", ".hpp", ".inc")):
        for part in (path.relative_to(sources).as_posix().encode(), path.read_bytes()):
            digest.update(len(part).to_bytes(8, "little") + part)
    digest.update("\0".join(flags).encode())
    return digest.hexdigest()[:16]


def compiler_key(compiler: Compiler, instructions: InstructionSet) -> str:
    """Return a hash of the compiler and of what it is told."""
    text = "\0".join((*compiler.command, compiler.identity, *compiler.flags(instructions)))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def library_suffix() -> str:
    return SUFFIXES.get(sys.platform, ".so")


def compile_library(
    compiler: Compiler,
    instructions: InstructionSet,
    target: Path,
    *,
    sources: Path = SOURCES,
    extra_flags: Sequence[str] = (),
    time_limit_s: float = TIME_LIMIT_S,
) -> None:
    """Compile `sources` into the shared library `target`, or raise BuildError with what the compiler said."""
    flags = (*compiler.flags(instructions), *extra_flags)
    command = [*compiler.command, *flags, "-shared", "-o", str(target), str(sources / UNIT)]
    output, status = _run(command, time_limit_s)
    if status != 0 or not target.is_file():
        said = "\n".join(output.strip().splitlines()[-_SHOWN_LINES:]) or "no output"
        raise BuildError(f"{shlex.join(command)} ended with status {status}:\n{said}")


def _run(command: Sequence[str], time_limit_s: float) -> tuple[str, int]:
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    except OSError as error:
        raise BuildError(f"{command[0]} cannot be started: {error}") from error
    try:
        output, _ = process.communicate(timeout=time_limit_s)
    except subprocess.TimeoutExpired as error:
        raise BuildError(f"{shlex.join(command)} did not end within {time_limit_s:g} s") from error
    finally:
        # A driver starts the compiler proper as a child; both go, also at a Ctrl-C.
        if process.poll() is None:
            _kill_group(process)
    return output.decode("utf-8", errors="replace"), process.returncode


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    if sys.platform == "win32":
        process.kill()
    else:
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
