"""Which instruction sets are the kernels compiled for, and which of them does this CPU run?

Invariant: a library runs only on a CPU that has every feature its flags let the compiler use, and whose
operating system saves the registers (the features are those that the system reports, not raw CPUID bits).
`-ffast-math` is never among the flags: results must not depend on how the compiler reorders a sum.
Sources: x86-64 psABI, section "Micro-Architecture Levels"; Linux, Documentation/arch/arm64/elf_hwcaps.rst.
"""

from __future__ import annotations

import ctypes
import platform
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from slipstream.kernels.cpu.unavailable import LibraryUnavailable

CPUINFO = Path("/proc/cpuinfo")
# IsProcessorFeaturePresent of Windows: PF_AVX2_INSTRUCTIONS_AVAILABLE.
_WINDOWS_AVX2 = 40
_MACHINES = {"amd64": "x86_64", "x86_64": "x86_64", "arm64": "aarch64", "aarch64": "aarch64"}

# Exact integer sums and fused products are written out in the source, so the compiler fuses nothing itself.
SHARED_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fno-math-errno", "-ffp-contract=off", "-pthread")


@dataclass(frozen=True, kw_only=True)
class InstructionSet:
    """One library's worth of code: `needs` as Linux spells them without underscores, flags per compiler."""

    name: str
    machine: str
    needs: frozenset[str]
    flags: tuple[str, ...]
    # Zig wants feature names of its own where GCC and Clang take an architecture.
    zig_flags: tuple[str, ...]


_AVX2 = frozenset(("avx2", "fma", "f16c", "bmi2"))
# x86-64-v4 contains v3, so a compiler may use any of these.
_AVX512 = frozenset(("avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl", "avx512vnni"))
_AVX2_FLAGS = ("-mavx2", "-mfma", "-mf16c", "-mbmi2")

# Best first.
INSTRUCTION_SETS = (
    InstructionSet(
        name="avx512vnni",
        machine="x86_64",
        needs=_AVX2 | _AVX512,
        flags=("-march=x86-64-v4", "-mavx512vnni"),
        zig_flags=("-mcpu=x86_64_v4+avx512vnni",),
    ),
    InstructionSet(
        name="avx2",
        machine="x86_64",
        needs=_AVX2,
        flags=_AVX2_FLAGS,
        zig_flags=("-mcpu=x86_64+avx2+fma+f16c+bmi2",),
    ),
    InstructionSet(
        name="neon",
        machine="aarch64",
        needs=frozenset(("asimd", "asimddp", "asimdhp")),
        flags=("-march=armv8.2-a+dotprod+fp16",),
        zig_flags=("-mcpu=generic+v8_2a+dotprod+fullfp16",),
    ),
)


def usable_sets(wanted: str = "") -> list[InstructionSet]:
    """Return the instruction sets that this CPU runs, best first, or only the one that is `wanted`.

    Raises LibraryUnavailable where there is none, or where the wanted one is unknown or not among them.
    """
    machine, features = machine_name(), cpu_features()
    usable = [s for s in INSTRUCTION_SETS if s.machine == machine and s.needs <= features]
    if not usable:
        raise LibraryUnavailable(
            _why_none(machine, features), "Use another machine; here plain torch is used."
        )
    if not wanted:
        return usable
    chosen = [s for s in usable if s.name == wanted]
    if not chosen:
        names = ", ".join(s.name for s in usable)
        raise LibraryUnavailable(
            f"SLIPSTREAM_CPU_INSTRUCTIONS is {wanted!r} and this CPU runs {names}.",
            "Unset it, or name one of these.",
        )
    return chosen


def _why_none(machine: str, features: frozenset[str]) -> str:
    known = [s for s in INSTRUCTION_SETS if s.machine == machine]
    if not known:
        return f"there are none for {machine or 'this machine'}, only for x86-64 and 64-bit ARM."
    least = known[-1]
    missing = ", ".join(sorted(least.needs - features))
    return f"this CPU lacks {missing}, which {least.name} needs."


def machine_name() -> str:
    """Return "x86_64", "aarch64", or what this machine calls itself otherwise."""
    name = platform.machine().lower()
    return _MACHINES.get(name, name)


def cpu_features() -> frozenset[str]:
    """Return the features of this CPU that the operating system lets a program use."""
    if sys.platform == "linux":
        return features_of_cpuinfo(
            CPUINFO.read_text(encoding="utf-8", errors="replace") if CPUINFO.exists() else ""
        )
    if sys.platform == "darwin":
        # Every ARM CPU of Apple has these; its x86 machines have no torch that this version runs on.
        return INSTRUCTION_SETS[-1].needs if machine_name() == "aarch64" else frozenset()
    return _features_from_torch() or _features_from_windows()


def features_of_cpuinfo(text: str) -> frozenset[str]:
    """Return the features that the text of /proc/cpuinfo lists for the first processor."""
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return _plain(value.split())
    return frozenset()


def _plain(names: Iterable[str]) -> frozenset[str]:
    # avx512_vnni and avx512_f, avx512f: the underscore differs between those who list features.
    return frozenset(name.replace("_", "") for name in names)


def _features_from_torch() -> frozenset[str]:
    import torch

    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    names = _plain(name for name, has in capabilities.items() if has is True)
    return names | {"fma"} if "fma3" in names else names


def _features_from_windows() -> frozenset[str]:
    # Windows names no FMA, F16C and BMI2; every CPU with AVX2 that it runs on has them.
    kernel32 = getattr(ctypes, "windll", None)
    has_avx2 = kernel32 is not None and kernel32.kernel32.IsProcessorFeaturePresent(_WINDOWS_AVX2)
    return _AVX2 if has_avx2 else frozenset()
