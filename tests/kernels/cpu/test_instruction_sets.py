"""Does a CPU get the best library it can run, and no better one?"""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from slipstream.kernels.cpu import instruction_sets
from slipstream.kernels.cpu.instruction_sets import INSTRUCTION_SETS, features_of_cpuinfo, usable_sets
from slipstream.kernels.cpu.unavailable import LibraryUnavailable

AVX2_FLAGS = "fpu sse2 sse4_2 avx avx2 fma f16c bmi1 bmi2"
AVX512_FLAGS = f"{AVX2_FLAGS} avx512f avx512dq avx512cd avx512bw avx512vl avx512_vnni"
NEON_FLAGS = "fp asimd evtstrm crc32 atomics fphp asimdhp cpuid asimdrdm asimddp"


@pytest.fixture
def cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def pretend(machine: str, line: str) -> None:
        path = tmp_path / "cpuinfo"
        path.write_text(f"processor\t: 0\n{line}\nbugs\t: none\n\nprocessor\t: 1\n", encoding="utf-8")
        monkeypatch.setattr(instruction_sets, "CPUINFO", path)
        monkeypatch.setattr(instruction_sets.sys, "platform", "linux")
        monkeypatch.setattr(platform, "machine", lambda: machine)

    return pretend


@pytest.mark.parametrize(
    ("machine", "line", "names"),
    [
        ("x86_64", f"flags\t\t: {AVX512_FLAGS}", ["avx512vnni", "avx2"]),
        ("x86_64", f"flags\t\t: {AVX2_FLAGS}", ["avx2"]),
        # AVX-512 without VNNI, as Skylake has it, runs the AVX2 code.
        ("x86_64", f"flags\t\t: {AVX512_FLAGS.replace('avx512_vnni', '')}", ["avx2"]),
        ("aarch64", f"Features\t: {NEON_FLAGS}", ["neon"]),
        ("AMD64", f"flags : {AVX2_FLAGS}", ["avx2"]),
    ],
)
def test_best_first(cpu, machine: str, line: str, names: list[str]) -> None:
    cpu(machine, line)
    assert [s.name for s in usable_sets()] == names


@pytest.mark.parametrize("feature", sorted(INSTRUCTION_SETS[0].needs))
def test_one_missing_feature_rules_a_set_out(cpu, feature: str) -> None:
    present = {flag.replace("_", ""): flag for flag in AVX512_FLAGS.split()}
    cpu("x86_64", "flags\t: " + " ".join(flag for name, flag in present.items() if name != feature))
    if feature in INSTRUCTION_SETS[1].needs:
        with pytest.raises(LibraryUnavailable, match=f"lacks {feature}, which avx2 needs"):
            usable_sets()
    else:
        assert [s.name for s in usable_sets()] == ["avx2"]


def test_a_cpu_of_another_kind_is_named(cpu) -> None:
    cpu("riscv64", "isa\t: rv64imafdc")
    with pytest.raises(LibraryUnavailable, match="none for riscv64"):
        usable_sets()


def test_a_wanted_set_is_used_alone_or_refused(cpu) -> None:
    cpu("x86_64", f"flags\t: {AVX512_FLAGS}")
    assert [s.name for s in usable_sets("avx2")] == ["avx2"]
    with pytest.raises(LibraryUnavailable, match="'neon' and this CPU runs avx512vnni, avx2"):
        usable_sets("neon")


def test_features_of_the_first_processor() -> None:
    assert features_of_cpuinfo("flags : a avx512_vnni\n\nflags : b\n") == {"a", "avx512vnni"}
    assert features_of_cpuinfo("") == frozenset()


@pytest.mark.parametrize("instructions", INSTRUCTION_SETS, ids=lambda s: s.name)
def test_no_flag_lets_a_compiler_reorder_sums(instructions) -> None:
    flags = (*instruction_sets.SHARED_FLAGS, *instructions.flags, *instructions.zig_flags)
    assert not {"-ffast-math", "-Ofast", "-funsafe-math-optimizations", "-fassociative-math"} & set(flags)
    assert "-ffp-contract=off" in flags
