"""How do wheels with the CPU kernels inside come about? Zig compiles them, for every platform on any of them.

A wheel holds the package, the sources of the kernels and one library per instruction set of its platform: it
installs without a compiler. Nothing is written into the checkout: each wheel is made from a copy of what
git tracks, in a temporary folder, and appears in the output folder whole. Needs ziglang and setuptools; the
first run takes ten minutes and more, since Zig compiles its C++ library for each target, and keeps it.

    python tools/build_wheels.py [--output dist] [linux-x86_64 linux-aarch64 macos-arm64 windows-x86_64]
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from slipstream.kernels.cpu.build import Compiler, compile_library, source_key  # noqa: E402
from slipstream.kernels.cpu.instruction_sets import INSTRUCTION_SETS  # noqa: E402
from slipstream.kernels.cpu.library import prebuilt_name  # noqa: E402

KERNELS = Path("slipstream") / "kernels" / "cpu"
TIME_LIMIT_S = 1800.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Platform:
    """A wheel's platform tag, Zig's name for the target, and the libraries that go in."""

    tag: str
    target: str
    suffix: str
    sets: tuple[str, ...]


# The oldest C libraries that wheels of torch run on.
PLATFORMS = {
    "linux-x86_64": Platform(
        tag="manylinux_2_28_x86_64",
        target="x86_64-linux-gnu.2.28",
        suffix=".so",
        sets=("avx2", "avx512vnni"),
    ),
    "linux-aarch64": Platform(
        tag="manylinux_2_28_aarch64", target="aarch64-linux-gnu.2.28", suffix=".so", sets=("neon",)
    ),
    "macos-arm64": Platform(
        tag="macosx_11_0_arm64", target="aarch64-macos.11.0", suffix=".dylib", sets=("neon",)
    ),
    "windows-x86_64": Platform(
        tag="win_amd64", target="x86_64-windows-gnu", suffix=".dll", sets=("avx2", "avx512vnni")
    ),
}

# Run in the copy. A wheel that holds libraries is for one platform, but for no one version of Python.
SETUP = """
import sys
from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel

class WithLibraries(Distribution):
    def has_ext_modules(self):
        return True

class PlatformWheel(bdist_wheel):
    def get_tag(self):
        return "py3", "none", sys.argv[1]

setup(
    distclass=WithLibraries,
    cmdclass={"bdist_wheel": PlatformWheel},
    script_args=["-q", "bdist_wheel", "--dist-dir", sys.argv[2]],
)
"""


def copy_tracked(target: Path) -> None:
    """Copy the files of the package that git tracks, as they are in the checkout."""
    paths = ("slipstream", "pyproject.toml", "README.md", "LICENSE")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--", *paths], cwd=ROOT, capture_output=True, check=True, text=True
    )
    for name in filter(None, listed.stdout.split("\0")):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, target / name)


def compile_sets(platform: Platform, package: Path) -> None:
    """Put the platform's libraries into the copied package."""
    compiler = Compiler(command=(sys.executable, "-m", "ziglang", "c++"), identity="", is_zig=True)
    prebuilt, sources = package / KERNELS / "prebuilt", package / KERNELS / "src"
    prebuilt.mkdir()
    for instructions in INSTRUCTION_SETS:
        if instructions.name not in platform.sets:
            continue
        name = prebuilt_name(instructions, source_key(sources), platform.suffix)
        print(f"  {name}", flush=True)
        # A library of macOS holds its own name, which would be the path it was written to.
        named = (f"-Wl,-install_name,@rpath/{name}",) if platform.suffix == ".dylib" else ()
        compile_library(
            compiler,
            instructions,
            prebuilt / name,
            sources=sources,
            # Stripped, and with paths cut: nothing of this machine goes into a wheel.
            extra_flags=("-target", platform.target, "-s", f"-ffile-prefix-map={package}=.", *named),
            time_limit_s=TIME_LIMIT_S,
        )
    for leftover in prebuilt.iterdir():
        # Beside a library Windows gets an import library and symbols, which only linkers want.
        if leftover.suffix != platform.suffix:
            leftover.unlink()


def build_wheel(platform: Platform, output: Path) -> Path:
    """Build one wheel into `output` and return its path. Raises BuildError or CalledProcessError."""
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="slipstream-wheel-") as name:
        package, made = Path(name) / "package", Path(name) / "made"
        package.mkdir()
        copy_tracked(package)
        compile_sets(platform, package)
        # Members of a wheel carry the time of the commit, so that equal sources give equal wheels.
        stamp = subprocess.run(
            ["git", "log", "-1", "--format=%ct"], cwd=ROOT, capture_output=True, check=True, text=True
        )
        environment = {**os.environ, "SOURCE_DATE_EPOCH": stamp.stdout.strip()}
        command = [sys.executable, "-c", SETUP, platform.tag, str(made)]
        subprocess.run(command, cwd=package, env=environment, check=True)
        (wheel,) = made.glob("*.whl")
        shutil.move(wheel, output / wheel.name)
    return output / wheel.name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("platforms", nargs="*", help="all where none is named")
    parser.add_argument("--output", type=Path, default=ROOT / "dist")
    arguments = parser.parse_args()
    unknown = ", ".join(name for name in arguments.platforms if name not in PLATFORMS)
    if unknown:
        parser.error(f"no platform is called {unknown}; there are {', '.join(PLATFORMS)}")
    if importlib.util.find_spec("ziglang") is None:
        sys.exit(
            "ziglang is not installed in this Python; `make wheels` installs it, or: pip install ziglang"
        )
    for name in arguments.platforms or PLATFORMS:
        print(f"{name}:", flush=True)
        print(f"  {build_wheel(PLATFORMS[name], arguments.output)}", flush=True)


if __name__ == "__main__":
    main()
