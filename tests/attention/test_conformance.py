"""Does every attention backend of the registry compute what dense attention does, unmoved by hidden NaN?"""

from __future__ import annotations

import pytest
import torch

from slipstream.attention import torch_reference
from slipstream.attention.base import AttentionBackend
from slipstream.attention.registry import BACKENDS
from tests.attention.dense import Case, run_paged

# float32 sums of at most 600 products against float64: some 1e-6. A key too many or too few moves an output
# by about 1 / length, more than 1e-3.
TOLERANCE = 2e-5
DECODES = ((1, 1), (1, 2), (1, 17), (1, 64), (1, 129), (1, 600), (1, 33))
MIXED = ((1, 5), (1, 300), (2, 2), (7, 40), (7, 7), (64, 64), (150, 411))


@pytest.fixture(params=BACKENDS.names())
def backend(request: pytest.FixtureRequest) -> AttentionBackend:
    return BACKENDS.get(request.param)()


def check(case: Case, backend: AttentionBackend, tolerance: float = TOLERANCE) -> None:
    given, expected = run_paged(case, backend)
    assert given.shape == expected.shape
    assert torch.isfinite(given).all()
    assert float((given.double() - expected).abs().max()) <= tolerance


@pytest.mark.parametrize("spans", [DECODES, MIXED], ids=["decodes", "mixed"])
@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
def test_head_sizes(backend: AttentionBackend, head_dim: int, spans: tuple[tuple[int, int], ...]) -> None:
    check(Case(spans=spans, head_dim=head_dim, seed=head_dim), backend)


@pytest.mark.parametrize("spans", [DECODES, MIXED], ids=["decodes", "mixed"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 4), (4, 1), (6, 2), (9, 3), (16, 2)])
def test_grouped_heads(
    backend: AttentionBackend, heads: int, kv_heads: int, spans: tuple[tuple[int, int], ...]
) -> None:
    check(Case(spans=spans, heads=heads, kv_heads=kv_heads, seed=heads), backend)


@pytest.mark.parametrize("window", [0, 5, 100])
@pytest.mark.parametrize("block_tokens", [8, 16, 32, 64, 128])
def test_page_sizes_and_windows(backend: AttentionBackend, block_tokens: int, window: int) -> None:
    for spans in (DECODES, MIXED):
        check(Case(spans=spans, block_tokens=block_tokens, window=window, seed=window), backend)


@pytest.mark.parametrize("window", [1, 7, 8, 9, 64, 599, 600, 601])
def test_windows_beside_block_edges(backend: AttentionBackend, window: int) -> None:
    for spans in (DECODES, MIXED):
        check(Case(spans=spans, block_tokens=8, window=window, seed=window), backend)


@pytest.mark.parametrize("window", [0, 33])
@pytest.mark.parametrize("softcap", [0.5, 30.0])
def test_soft_caps(backend: AttentionBackend, softcap: float, window: int) -> None:
    for spans in (DECODES, MIXED, ((64, 64),)):
        check(Case(spans=spans, softcap=softcap, window=window), backend)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_pages(backend: AttentionBackend, dtype: torch.dtype) -> None:
    if str(dtype).removeprefix("torch.") not in backend.capability.kv_dtypes:
        pytest.skip("the backend does not serve pages of this type, and says so")
    # The inputs are rounded to the pages' type beforehand, so only float32 arithmetic is left.
    for spans in (DECODES, MIXED):
        check(Case(spans=spans, kv_dtype=dtype), backend)


def test_a_long_span_is_cut_into_runs(backend: AttentionBackend) -> None:
    for window in (0, 20):
        check(Case(spans=((1, 9), (1100, 1130)), head_dim=16, window=window), backend)


@pytest.mark.parametrize("limit", [1, 4096, 1 << 30])
def test_pieces_of_any_size_agree(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    monkeypatch.setattr(torch_reference, "MAX_GATHER_BYTES", limit)
    for window in (0, 40):
        check(Case(spans=DECODES, window=window, block_tokens=8), torch_reference.TorchReference())


def test_a_window_off_by_one_would_be_seen(backend: AttentionBackend) -> None:
    given, _ = run_paged(Case(spans=DECODES, window=40), backend)
    wider, _ = run_paged(Case(spans=DECODES, window=41, block_tokens=16), backend)
    assert float((given - wider).abs().max()) > 100 * TOLERANCE


def test_random_batches(backend: AttentionBackend) -> None:
    generator = torch.Generator().manual_seed(5)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=generator))

    for seed in range(12):
        lengths = [draw(1, 600) for _ in range(draw(1, 9))]
        spans = sorted((draw(1, length) if draw(0, 2) == 0 else 1, length) for length in lengths)
        window = draw(1, 200) if draw(0, 1) else 0
        case = Case(spans=tuple(spans), block_tokens=2 ** draw(3, 7), window=window, head_dim=32, seed=seed)
        check(case, backend)
