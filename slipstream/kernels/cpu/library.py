"""Where does the compiled library of CPU kernels come from? Found or built once per process, on first use.

In this order: the library that a wheel carries, one built earlier on this machine, a build by the system's
compiler, a build by Zig's. Without any, `library` raises LibraryUnavailable, whose `fix` says in one line how
to get one; callers then use plain torch and say so. The caller never sees a half-usable library: a build that
fails, or a file that does not load, leads to the next way.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from slipstream import __version__
from slipstream.core import env
from slipstream.kernels.cpu import library_cache
from slipstream.kernels.cpu.build import (
    HOW_TO_GET_A_COMPILER,
    SOURCES,
    UNIT,
    BuildError,
    Compiler,
    compile_library,
    compiler_key,
    find_compilers,
    library_suffix,
    source_key,
)
from slipstream.kernels.cpu.instruction_sets import InstructionSet, usable_sets
from slipstream.kernels.cpu.signatures import declare
from slipstream.kernels.cpu.unavailable import LibraryUnavailable

__all__ = ["LibraryUnavailable", "instruction_set", "library"]

PREBUILT = Path(__file__).parent / "prebuilt"
_log = logging.getLogger(__name__)
_lock = threading.Lock()


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A library in this process, what it was compiled for, and the file it came from."""

    handle: ctypes.CDLL
    instructions: str
    path: Path


def library() -> ctypes.CDLL:
    """Return the kernels, building them on first use. Blocks for seconds then; raises LibraryUnavailable."""
    return loaded().handle


def is_available() -> bool:
    """Say whether `library` returns one; builds it on first use."""
    with _lock:
        return isinstance(_load_once(env.cpu_instructions(), env.kernel_cache_key()), Loaded)


def instruction_set() -> str:
    """Return what `library` was compiled for: "avx2", "avx512vnni" or "neon". Loads it."""
    return loaded().instructions


def loaded() -> Loaded:
    """Return the library of this process with where it came from."""
    with _lock:
        outcome = _load_once(env.cpu_instructions(), env.kernel_cache_key())
    if isinstance(outcome, LibraryUnavailable):
        raise LibraryUnavailable(outcome.reason, outcome.fix)
    return outcome


@functools.cache
def _load_once(wanted: str, cache: str) -> Loaded | LibraryUnavailable:
    # `cache` is read again below; as an argument it separates what tests build in folders of their own. A
    # failure is remembered too: a compiler that failed would cost every caller seconds.
    try:
        return find_or_build(wanted, sources=SOURCES)
    except LibraryUnavailable as error:
        return error


def find_or_build(wanted: str, *, sources: Path) -> Loaded:
    """Return a loaded library for the best instruction set, or the `wanted` one ("" means the best)."""
    if not (sources / UNIT).is_file():
        raise LibraryUnavailable(f"{UNIT} is missing from the package.", "Install slipstream-llm again.")
    failures: list[str] = []
    for instructions in usable_sets(wanted):
        for path in _candidates(instructions, sources, failures):
            try:
                handle = ctypes.CDLL(str(path))
            except OSError as error:
                failures.append(f"{path.name} does not load: {error}")
                continue
            declare(handle)
            _log.info("CPU kernels: %s from %s", instructions.name, path)
            return Loaded(handle=handle, instructions=instructions.name, path=path)
    if not failures:
        raise LibraryUnavailable("there is no prebuilt library and no C++ compiler.", HOW_TO_GET_A_COMPILER)
    raise LibraryUnavailable("no build succeeded.\n" + "\n".join(failures) + "\n", HOW_TO_GET_A_COMPILER)


def _candidates(instructions: InstructionSet, sources: Path, failures: list[str]) -> Iterator[Path]:
    """Yield files to try, the cheapest first; a build happens only when its turn comes."""
    key = source_key(sources)
    prebuilt = PREBUILT / prebuilt_name(instructions, key, library_suffix())
    if prebuilt.is_file():
        yield prebuilt
    folder = library_cache.cache_folder()
    compilers = find_compilers()
    if not compilers:
        earlier = library_cache.find_any(folder, cache_name(instructions, key))
        if earlier is not None:
            yield earlier
    for compiler in compilers:
        name = cache_name(instructions, key, compiler)
        kept = library_cache.find(folder, name)
        if kept is not None:
            yield kept
        _log.warning("Compiling the CPU kernels for %s; this happens once.", instructions.name)
        build = functools.partial(compile_library, compiler, instructions, sources=sources)
        try:
            yield library_cache.add(folder, name, suffix=library_suffix(), build=build)
        except (BuildError, OSError) as error:
            failures.append(str(error))


def cache_name(instructions: InstructionSet, key: str, compiler: Compiler | None = None) -> str:
    """Return what a build is kept as; without a compiler, what the names of all compilers start with."""
    ending = "" if compiler is None else compiler_key(compiler, instructions)
    return f"slipstream_cpu-{__version__}-{instructions.name}-{key}-{ending}"


def prebuilt_name(instructions: InstructionSet, key: str, suffix: str) -> str:
    """Return the file name of a wheel's library; the key keeps one of other sources from being loaded."""
    return f"slipstream_cpu-{instructions.name}-{key}{suffix}"
