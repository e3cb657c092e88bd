"""Does `slipstream verify --kernel` find a kernel, run its grid, and end with 1 where it is wrong?"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from slipstream.kernels.plugins import KERNELS, unregister_kernel
from tests.cli.conftest import Slipstream

SOURCE = """
import torch
from slipstream.kernels import KernelCapability, register_kernel

def double(x):
    gate, up = x.float().chunk(2, dim=-1)
    return ({factor} * gate * torch.sigmoid(gate) * up).to(x.dtype)

KERNEL = register_kernel(
    double, op="silu_and_mul", name="doubled", capability=KernelCapability(devices=frozenset({{{devices}}}))
)
OTHER = 3
"""


@pytest.fixture(autouse=True)
def leave_nothing_behind() -> Iterator[None]:
    yield
    for plugin in KERNELS.plugins():
        unregister_kernel(plugin.name)


@pytest.fixture
def kernel_file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(SOURCE.format(factor=1.0, devices="'cpu'"), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["KERNEL", "doubled"])
def test_a_right_kernel(slipstream: Slipstream, kernel_file: Path, name: str) -> None:
    finished = slipstream("verify", "--kernel", f"{kernel_file}:{name}")
    assert finished.code == 0, finished.err
    assert finished.out.startswith("kernel 'doubled' for silu_and_mul on cpu: 15 cases agree")


def test_a_wrong_kernel(slipstream: Slipstream, kernel_file: Path) -> None:
    kernel_file.write_text(SOURCE.format(factor=2.0, devices="'cpu'"), encoding="utf-8")
    finished = slipstream("verify", "--kernel", f"{kernel_file}:KERNEL")
    assert finished.code == 1 and "doubled does not compute silu_and_mul" in finished.err
    assert "x (5, 192), bfloat16: output 0 is off by" in finished.out


def test_a_kernel_for_a_device_that_is_not_there(
    slipstream: Slipstream, kernel_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    kernel_file.write_text(SOURCE.format(factor=1.0, devices="'cuda'"), encoding="utf-8")
    finished = slipstream("verify", "--kernel", f"{kernel_file}:KERNEL")
    assert finished.code == 1 and "'doubled' runs on cuda" in finished.err


@pytest.mark.parametrize(
    ("arguments", "code", "complaint"),
    [
        ((), 2, "Give a MODEL, or --kernel"),
        (("model", "--kernel", "a:b"), 2, "leave MODEL out"),
        (("--kernel", "a:b", "--dtype", "float32"), 2, "leave dtype out"),
        (("--kernel", "nothing"), 1, "write module:name or file.py:name"),
        (("--kernel", "no_such_module:KERNEL"), 1, "no_such_module cannot be imported"),
        (("--kernel", "no/such/file.py:KERNEL"), 1, "file.py cannot be imported"),
    ],
)
def test_what_makes_no_sense(
    slipstream: Slipstream, arguments: tuple[str, ...], code: int, complaint: str
) -> None:
    finished = slipstream("verify", *arguments)
    assert finished.code == code and complaint in finished.err, finished.err


def test_an_unknown_name_is_answered_with_the_nearest(slipstream: Slipstream, kernel_file: Path) -> None:
    finished = slipstream("verify", "--kernel", f"{kernel_file}:KERNELS")
    assert finished.code == 1
    assert "there are: KERNEL, doubled. Did you mean 'KERNEL'?" in finished.err
