"""Does every wheel carry its libraries under its tag, and does this platform's run without a compiler?"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest

from slipstream import __version__
from slipstream.kernels.cpu.instruction_sets import machine_name, usable_sets

ROOT = Path(__file__).resolve().parents[3]
PREBUILT = "slipstream/kernels/cpu/prebuilt/"
# Bytes that a library of this format starts with, the machine it names included: ELF, Mach-O, PE.
MAGIC = {".so": b"\x7fELF\x02\x01\x01", ".dylib": bytes.fromhex("cffaedfe0c000001"), ".dll": b"MZ"}
ELF_MACHINES = {"x86_64": 62, "aarch64": 183}

pytestmark = [
    pytest.mark.slow,
    # Zig compiles its C++ library for each of six targets before it keeps them.
    pytest.mark.timeout(5400),
    pytest.mark.skipif(
        importlib.util.find_spec("ziglang") is None, reason="needs ziglang: pip install 'slipstream-llm[zig]'"
    ),
]


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every wheel, by its platform tag."""
    output = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "tools/build_wheels.py", "--output", str(output)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return {path.stem.rpartition("-")[2]: path for path in output.glob("*.whl")}


CASES = {
    "manylinux_2_28_x86_64": (".so", ["avx2", "avx512vnni"]),
    "manylinux_2_28_aarch64": (".so", ["neon"]),
    "macosx_11_0_arm64": (".dylib", ["neon"]),
    "win_amd64": (".dll", ["avx2", "avx512vnni"]),
}


def test_one_wheel_per_platform(wheels: dict[str, Path]) -> None:
    assert set(wheels) == set(CASES)
    assert {path.name for path in wheels.values()} == {
        f"slipstream_llm-{__version__}-py3-none-{tag}.whl" for tag in CASES
    }


@pytest.mark.parametrize("tag", CASES)
def test_libraries_and_sources_are_inside(wheels: dict[str, Path], tag: str) -> None:
    suffix, sets = CASES[tag]
    with zipfile.ZipFile(wheels[tag]) as wheel:
        names = wheel.namelist()
        libraries = sorted(name.removeprefix(PREBUILT) for name in names if name.startswith(PREBUILT))
        contents = [wheel.read(PREBUILT + name) for name in libraries]
        (record,) = (name for name in names if name.endswith(".dist-info/WHEEL"))
        stated = wheel.read(record).decode()
    pattern = r"slipstream_cpu-(\w+)-[0-9a-f]{16}" + re.escape(suffix)
    matches = [re.fullmatch(pattern, name) for name in libraries]
    assert [match[1] for match in matches if match is not None] == sets
    assert len(libraries) == len(sets)
    assert all(content.startswith(MAGIC[suffix]) for content in contents)
    if suffix == ".so":
        machine = ELF_MACHINES[tag.partition("28_")[2]]
        assert all(int.from_bytes(content[18:20], "little") == machine for content in contents)
    assert "slipstream/kernels/cpu/src/slipstream_cpu.cpp" in names
    assert f"Tag: py3-none-{tag}\n" in stated
    assert "Root-Is-Purelib: false\n" in stated
    assert not [name for name in names if not name.startswith(("slipstream/", "slipstream_llm-"))]


@pytest.mark.parametrize("tag", CASES)
def test_nothing_of_this_machine_is_inside(wheels: dict[str, Path], tag: str) -> None:
    places = [str(ROOT), str(Path.home()) + "/", tempfile.gettempdir() + "/slipstream", sys.prefix]
    with zipfile.ZipFile(wheels[tag]) as wheel:
        for name in wheel.namelist():
            content = wheel.read(name)
            assert not [place for place in places if place.encode() in content], name


@pytest.mark.parametrize("tag", [tag for tag in CASES if tag.startswith("manylinux")])
def test_no_newer_c_library_is_needed(wheels: dict[str, Path], tag: str) -> None:
    with zipfile.ZipFile(wheels[tag]) as wheel:
        for name in wheel.namelist():
            if name.startswith(PREBUILT):
                versions = re.findall(rb"GLIBC_(\d+)\.(\d+)", wheel.read(name))
                assert versions
                assert max((int(major), int(minor)) for major, minor in versions) <= (2, 28)


@pytest.mark.skipif(sys.platform != "linux" or machine_name() != "x86_64", reason="runs where its wheel does")
def test_the_wheel_runs_without_a_compiler(wheels: dict[str, Path], tmp_path: Path) -> None:
    site, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", str(site)]
    subprocess.run([*command, str(wheels["manylinux_2_28_x86_64"])], check=True)
    code = """
import sys
sys.modules["ziglang"] = None
from slipstream.kernels.cpu.library import loaded
print(loaded().path)
loaded().handle.ss_set_threads(2)
print(loaded().instructions, loaded().handle.ss_num_threads())
"""
    environment = {
        **os.environ,
        "PYTHONPATH": str(site),
        "PATH": str(empty),
        "SLIPSTREAM_KERNEL_CACHE": str(tmp_path / "cache"),
    }
    environment.pop("CXX", None)
    result = subprocess.run(
        [sys.executable, "-P", "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    path, said = result.stdout.splitlines()
    assert Path(path).parent == site / "slipstream" / "kernels" / "cpu" / "prebuilt"
    assert said == f"{usable_sets()[0].name} 2"
