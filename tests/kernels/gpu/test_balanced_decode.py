"""Do rows of any lengths get what float64 gives them, wherever the borders between programs stand?

Every position that no row may read holds NaN. float32 sums of some thousand products against float64: 1e-6.
"""

from __future__ import annotations

import random

import pytest
import torch

from slipstream.kernels.decode_borders import decode_borders as definition_of_borders
from slipstream.kernels.decode_shares import keys_of_unit, num_programs
from slipstream.kernels.paged_decode import NUM_COUNTERS, paged_decode
from tests.kernels.gpu.conftest import HAS_GPU, has_interpreter
from tests.kernels.gpu.ragged_pages import draw_pages

if HAS_GPU or has_interpreter():
    from slipstream.kernels.gpu.balanced_decode import balanced_decode
    from slipstream.kernels.gpu.decode_borders import decode_borders

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2}
LENGTHS = {
    "short": [1, 2, 17, 64, 129, 33],
    "empty rows": [0, 1, 0, 0, 100, 64, 0, 33, 0],
    "one long": [3, 900, 40],
    "even": [96] * 8,
    "nobody": [0, 0, 0],
}


def check(device: str, lens: list[int], programs: int, *, dtype: torch.dtype = torch.float32, **case) -> None:
    heads, kv_heads, size = case.get("heads", (4, 2, 32))
    window, softcap = case.get("window", 0), case.get("softcap", 0.0)
    pages, table = draw_pages(lens, kv_heads, size, 16)
    generator = torch.Generator().manual_seed(len(lens))
    q = torch.randn(len(lens), heads, size, generator=generator).to(dtype)
    pages, lens_R = pages.to(dtype), torch.tensor(lens)
    expected = torch.full((len(lens), heads, size), torch.nan, dtype=torch.float64)
    nothing = torch.empty(0)
    scoring = (size**-0.5, window, softcap)
    paged_decode(q.double(), pages, table, lens_R, expected, nothing, 0, *scoring)
    cut = (None, kv_heads, keys_of_unit(dtype, size), window, programs)
    q, pages, table, lens_R = (x.to(device) for x in (q, pages, table, lens_R))
    borders = decode_borders(lens_R, *cut)
    assert torch.equal(borders, definition_of_borders(lens_R, *cut))
    out, counters = torch.full_like(q, torch.nan), torch.zeros(NUM_COUNTERS, dtype=torch.int32, device=device)
    for _ in range(2 if HAS_GPU else 1):
        balanced_decode(q, pages, table, lens_R, borders, out, counters, *scoring)
        assert not bool(counters.any())
        assert float((out.double().cpu() - expected).abs().max()) <= TOLERANCE[dtype]


@pytest.mark.parametrize("programs", [7, 40])
@pytest.mark.parametrize("name", LENGTHS)
def test_lengths(device: str, name: str, programs: int) -> None:
    check(device, LENGTHS[name], programs)


@pytest.mark.parametrize(
    "case",
    [
        {"heads": (3, 1, 16), "softcap": 5.0},
        {"heads": (8, 8, 24), "window": 50},
        {"heads": (16, 1, 64), "window": 300, "softcap": 30.0},
        {"heads": (7, 1, 256)},
    ],
    ids=str,
)
def test_shapes_windows_and_caps(device: str, case: dict) -> None:
    check(device, [400, 3, 0, 90], 11, **case)


def test_random_rows(device: str) -> None:
    rng = random.Random(4)
    for _ in range(4):
        lens = [rng.choice((0, rng.randint(1, 60), rng.randint(1, 300))) for _ in range(rng.randint(2, 12))]
        check(device, lens, rng.randint(1, 50), window=rng.choice((0, 60)))


@pytest.mark.skipif(not HAS_GPU, reason="needs a GPU: interpreted, it takes minutes")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [(32, 8, 128), (16, 8, 128), (4, 1, 256), (32, 8, 64)])
def test_ragged_rows_on_all_multiprocessors(device: str, dtype: torch.dtype, heads: tuple) -> None:
    rng = random.Random(6)
    programs = num_programs(torch.device("cuda"))
    ragged = [rng.randint(100, 2048) for _ in range(64)]
    for lens in (ragged, [0, *ragged, 0], [9000, 1, 1, 1], [5] * 300, [192] * 64):
        check(device, lens, programs, dtype=dtype, heads=heads)
