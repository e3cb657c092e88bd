"""Do the GPU's attention kernels compute what dense attention in float64 does, unmoved by hidden NaN?

The grid of `tests/attention` runs the backend with the definitions where there is no GPU; here its kernels
run, on a GPU or interpreted.
"""

from __future__ import annotations

import pytest
import torch

from slipstream.attention import triton as backend_file
from slipstream.attention.triton import TritonAttention
from slipstream.kernels.paged_decode import NUM_COUNTERS
from tests.attention.dense import Case, run_paged
from tests.kernels.gpu.conftest import HAS_GPU

# float32 sums of at most 600 products against float64: some 1e-6. The inputs of narrower types are rounded
# beforehand, so what is left is the rounding of the weights and of the result, each half a unit of a value of
# at most about 3 (2^-11 and 2^-8 of it).
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
DECODES = ((1, 1), (1, 2), (1, 17), (1, 64), (1, 129), (1, 33))
MIXED = ((1, 5), (1, 130), (2, 2), (7, 40), (40, 40), (70, 111))


@pytest.fixture(autouse=True)
def kernels_instead_of_definitions(monkeypatch: pytest.MonkeyPatch) -> None:
    if HAS_GPU:
        return
    from slipstream.kernels.gpu.balanced_decode import balanced_decode
    from slipstream.kernels.gpu.decode_borders import decode_borders
    from slipstream.kernels.gpu.paged_decode import paged_decode
    from slipstream.kernels.gpu.paged_prefill import paged_prefill
    from slipstream.kernels.gpu.store_slots import store_slots

    monkeypatch.setattr(backend_file, "balanced_decode_op", balanced_decode)
    monkeypatch.setattr(backend_file, "decode_borders_op", decode_borders)
    monkeypatch.setattr(backend_file, "paged_decode_op", paged_decode)
    monkeypatch.setattr(backend_file, "paged_prefill_op", paged_prefill)
    monkeypatch.setattr(backend_file, "store_slots_op", store_slots)


def check(device: str, **fields: object) -> None:
    case = Case(device=device, **fields)  # type: ignore[arg-type]
    given, expected = run_paged(case, TritonAttention())
    assert given.shape == expected.shape and given.dtype == case.dtype
    assert torch.isfinite(given).all()
    assert float((given.double() - expected).abs().max()) <= TOLERANCE[case.dtype]


@pytest.mark.parametrize("spans", [DECODES, MIXED], ids=["decodes", "mixed"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(4, 1, 64), (2, 2, 80), (6, 2, 128), (2, 1, 256), (9, 3, 16)]
)
def test_head_shapes(device: str, heads: int, kv_heads: int, head_dim: int, spans: tuple) -> None:
    check(device, spans=spans, heads=heads, kv_heads=kv_heads, head_dim=head_dim)


# Interpreted, each takes seconds: the ends of the grid there.
@pytest.mark.parametrize("window", [1, 7, 40, 129] if HAS_GPU else [7, 129])
@pytest.mark.parametrize("block_tokens", [8, 32, 64] if HAS_GPU else [8, 64])
def test_pages_and_windows(device: str, block_tokens: int, window: int) -> None:
    for spans in (DECODES, MIXED):
        check(device, spans=spans, block_tokens=block_tokens, window=window, heads=2, kv_heads=1)


@pytest.mark.parametrize("window", [0, 33])
@pytest.mark.parametrize("softcap", [0.5, 30.0])
def test_soft_caps(device: str, softcap: float, window: int) -> None:
    for spans in (DECODES, MIXED):
        check(device, spans=spans, softcap=softcap, window=window, heads=2, kv_heads=1)


@pytest.mark.parametrize("kv_dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_types(device: str, dtype: torch.dtype, kv_dtype: torch.dtype) -> None:
    if dtype != torch.float32 and kv_dtype not in (dtype, torch.float32):
        pytest.skip("one narrow type is never kept as another")
    if not HAS_GPU and dtype == torch.bfloat16:
        pytest.skip("numpy, in which triton interprets, has no bfloat16")
    kv_dtype = kv_dtype if dtype == torch.float32 else dtype
    for spans in (DECODES, MIXED):
        check(device, spans=spans, dtype=dtype, kv_dtype=kv_dtype)


def test_a_row_of_no_tokens_gives_zeros(device: str) -> None:
    """A captured step has unused rows; they must stay finite and touch no page."""
    q_RNH = torch.randn(3, 4, 64, device=device)
    pages = torch.full((2, 2, 16, 2, 64), float("nan"), device=device)
    table = torch.zeros(3, 400, dtype=torch.int32, device=device)
    lens = torch.zeros(3, dtype=torch.int64, device=device)
    counters = torch.zeros(NUM_COUNTERS, dtype=torch.int32, device=device)
    for max_len in (16, 6400):
        out = torch.full_like(q_RNH, float("nan"))
        backend_file.paged_decode_op(q_RNH, pages, table, lens, out, counters, max_len, 0.1, 0, 0.0)
        assert not counters.any()
        assert torch.equal(out, torch.zeros_like(out))


def test_negative_slots_write_nothing(device: str) -> None:
    pages = torch.zeros(3, 2, 16, 2, 64, device=device)
    k = torch.ones(3, 2, 64, device=device)
    slots = torch.tensor([-1, 17, -1], device=device)
    backend_file.store_slots_op(k, 2 * k, pages, slots)
    assert float(pages.sum()) == 3 * 2 * 64
    assert float(pages[1, 0, 1].min()) == 1.0 and float(pages[1, 1, 1].min()) == 2.0


@pytest.mark.skipif(not HAS_GPU, reason="needs a GPU: interpreted, it takes minutes")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [0, 1000])
def test_ragged_lengths_to_8k(device: str, dtype: torch.dtype, window: int) -> None:
    generator = torch.Generator().manual_seed(3)
    lengths = [1, 31, 32, 33, 4095, 4096, 8191, 8192, *torch.randint(1, 8193, (24,), generator=generator)]
    decodes = tuple((1, int(length)) for length in lengths)
    chunks = tuple((min(int(n), 1 + 97 * i), int(n)) for i, n in enumerate(lengths[::2]))
    fields = {"heads": 8, "kv_heads": 2, "head_dim": 128, "block_tokens": 32, "window": window}
    for spans in (decodes, decodes[:1], decodes[6:7], tuple(sorted(chunks))):
        check(device, spans=spans, dtype=dtype, kv_dtype=dtype, **fields)
