"""What stands in for the device library where kernels are interpreted? numpy's exponential, an exact fma."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace

import pytest

from tests.kernels.gpu.conftest import HAS_GPU, has_interpreter

if HAS_GPU or has_interpreter():
    import triton
    import triton.language as tl

    @triton.jit
    def _exp(x):  # type: ignore[no-untyped-def]
        return tl.exp(x)

    @triton.jit
    def _fma(x, y, z):  # type: ignore[no-untyped-def]
        # The product of two float32 is exact in float64.
        return (x.to(tl.float64) * y.to(tl.float64) + z.to(tl.float64)).to(tl.float32)


def replace_libdevice(monkeypatch: pytest.MonkeyPatch, *files: ModuleType) -> None:
    """Make kernels of these modules run where there is no GPU; on one they stay as they are."""
    if not HAS_GPU:
        for file in files:
            monkeypatch.setattr(file, "libdevice", SimpleNamespace(exp=_exp, fma_rn=_fma))
