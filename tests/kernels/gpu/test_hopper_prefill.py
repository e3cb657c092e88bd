"""Does Hopper's own kernel of prompts compute what dense attention in float64 does, and does it run?

It is written in Gluon, which nothing interprets: only a GPU of compute capability 9.0 runs these.
"""

from __future__ import annotations

import pytest
import torch

from slipstream.attention import triton as backend_file
from slipstream.attention.triton import TritonAttention
from tests.attention.dense import Case, run_paged
from tests.kernels.gpu.conftest import HAS_GPU

IS_HOPPER = HAS_GPU and torch.cuda.get_device_capability() == (9, 0)
pytestmark = pytest.mark.skipif(not IS_HOPPER, reason="needs a Hopper GPU")
TOLERANCE = {torch.float16: 4e-3, torch.bfloat16: 3e-2}
SPANS = ((2, 2), (7, 513), (64, 64), (65, 200), (128, 256), (130, 130), (200, 1000), (300, 301))


def forced(*arguments: object) -> None:
    """The kernel for whatever it is asked; the op would cut so small a step and take the general one."""
    from slipstream.kernels.gpu.hopper_prefill import hopper_prefill

    hopper_prefill(*arguments[:10])  # type: ignore[arg-type]


def check(monkeypatch: pytest.MonkeyPatch, **fields: object) -> None:
    monkeypatch.setattr(backend_file, "paged_prefill_op", forced)
    case = Case(device="cuda", **({"spans": SPANS, "dtype": torch.bfloat16} | fields))  # type: ignore[arg-type]
    given, expected = run_paged(case, TritonAttention())
    assert torch.isfinite(given).all()
    assert float((given.double() - expected).abs().max()) <= TOLERANCE[case.dtype]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(4, 1, 64), (8, 2, 128), (6, 2, 128), (2, 2, 256), (4, 1, 256)]
)
def test_head_shapes(
    monkeypatch: pytest.MonkeyPatch, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype
) -> None:
    shape = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
    check(monkeypatch, dtype=dtype, kv_dtype=dtype, block_tokens=32, **shape)


@pytest.mark.parametrize("block_tokens", [8, 16, 64])
@pytest.mark.parametrize("window", [0, 1, 40, 129, 300])
def test_pages_and_windows(monkeypatch: pytest.MonkeyPatch, block_tokens: int, window: int) -> None:
    shape = {"heads": 4, "kv_heads": 2, "head_dim": 128, "kv_dtype": torch.bfloat16}
    check(monkeypatch, block_tokens=block_tokens, window=window, **shape)


@pytest.mark.parametrize("softcap", [0.5, 30.0])
def test_soft_caps(monkeypatch: pytest.MonkeyPatch, softcap: float) -> None:
    shape = {"heads": 4, "kv_heads": 2, "head_dim": 128, "kv_dtype": torch.bfloat16, "block_tokens": 32}
    check(monkeypatch, softcap=softcap, **shape)


@pytest.mark.parametrize("wanted", [1, 2, 16])
@pytest.mark.parametrize("window", [0, 3000])
def test_shares_of_long_contexts(monkeypatch: pytest.MonkeyPatch, window: int, wanted: int) -> None:
    from slipstream.kernels.gpu.hopper_prefill import hopper_prefill

    monkeypatch.setattr(
        backend_file, "paged_prefill_op", lambda *given: hopper_prefill(*given[:10], wanted=wanted)
    )
    shape = {"heads": 8, "kv_heads": 2, "head_dim": 128, "kv_dtype": torch.bfloat16, "block_tokens": 32}
    spans = ((3, 1100), (64, 4160), (130, 5000), (300, 3000))
    case = Case(device="cuda", spans=spans, window=window, dtype=torch.bfloat16, **shape)  # type: ignore[arg-type]
    given, expected = run_paged(case, TritonAttention())
    assert float((given.double() - expected).abs().max()) <= TOLERANCE[torch.bfloat16]


def test_long_prompts_take_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from slipstream.kernels.gpu import hopper_prefill

    calls: list[int] = []
    kernel = hopper_prefill.hopper_prefill

    def counted(*arguments: object) -> None:
        calls.append(1)
        kernel(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(hopper_prefill, "hopper_prefill", counted)
    fields = {"heads": 32, "kv_heads": 8, "head_dim": 128, "block_tokens": 32, "kv_dtype": torch.bfloat16}
    case = Case(device="cuda", spans=((1, 700), (2048, 3000)), dtype=torch.bfloat16, **fields)  # type: ignore[arg-type]
    given, expected = run_paged(case, TritonAttention())
    assert calls == [1]
    assert float((given.double() - expected).abs().max()) <= TOLERANCE[torch.bfloat16]
