"""How are Triton kernels run where there is no GPU? By triton's interpreter, if triton is installed.

On a machine with a GPU they run there, and the tests of this folder are marked `gpu` like any other that
needs one; elsewhere they belong to the default suite, in small.
"""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
# Older interpreters fail at a loop whose bounds are tensors, with the numpy of today.
FIRST_INTERPRETER = (3, 7)


def has_interpreter() -> bool:
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return False
    return tuple(int(part) for part in version.split(".")[:2]) >= FIRST_INTERPRETER


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            if HAS_GPU:
                item.add_marker(pytest.mark.gpu)
            elif not has_interpreter():
                item.add_marker(pytest.mark.skip(reason="no GPU, and no triton >= 3.7 to interpret kernels"))


@pytest.fixture
def device() -> str:
    return "cuda" if HAS_GPU else "cpu"
