"""Is a shared beginning read once for all rows, and is the result that of each row by itself?

Only the first row of a group names the shared pages, so whoever reads them by another row's table reads NaN.
float32 sums of some thousand products against float64: 1e-6.
"""

from __future__ import annotations

import random

import pytest
import torch

from slipstream.kernels.decode_borders import decode_borders as definition_of_borders
from slipstream.kernels.decode_shares import keys_of_unit, num_programs
from slipstream.kernels.paged_decode import NUM_COUNTERS, paged_decode
from slipstream.kernels.shared_prefix import SharedGroup
from tests.kernels.gpu.conftest import HAS_GPU, has_interpreter
from tests.kernels.gpu.shared_rows import SharedStep, make_step

if HAS_GPU or has_interpreter():
    from slipstream.kernels.gpu.decode_borders import decode_borders
    from slipstream.kernels.gpu.shared_prefix_decode import shared_prefix_decode

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2}
CASES = {
    "one tile": ([100, 90, 200, 5, 0, 70], [SharedGroup((0, 2, 1), 64)], (4, 2, 32)),
    "chunks": ([1000, 990, 1200, 5, 0, 70], [SharedGroup((0, 2, 1), 976)], (4, 2, 32)),
    "tiles and groups": (
        [70] * 12 + [0, 200],
        [SharedGroup(tuple(range(0, 12, 2)), 64), SharedGroup((1, 3, 11), 48)],
        (32, 2, 16),
    ),
    "one row ends with its page": ([97, 97], [SharedGroup((1, 0), 96)], (6, 2, 64)),
    "nothing shared": ([100, 90, 0], [], (4, 2, 32)),
}


def check(step: SharedStep, programs: int, softcap: float = 0.0) -> None:
    size = step.q_RNH.shape[2]
    scoring = (size**-0.5, softcap)
    expected = torch.full(step.q_RNH.shape, torch.nan, dtype=torch.float64)
    alone = (step.q_RNH.double().cpu(), step.pages.double().cpu(), step.whole_RC.cpu(), step.lens_R.cpu())
    paged_decode(*alone, expected, torch.empty(0), 0, scoring[0], 0, softcap)
    keys = keys_of_unit(step.q_RNH.dtype, size)
    cut = (step.lens_R, step.shared.rows_5R[0], step.pages.shape[3], keys, 0, programs)
    borders = decode_borders(*cut)
    assert torch.equal(borders, definition_of_borders(*cut))
    counters = torch.zeros(NUM_COUNTERS, dtype=torch.int32, device=step.q_RNH.device)
    out = torch.full_like(step.q_RNH, torch.nan)
    given = (step.q_RNH, step.pages, step.table_RC, step.lens_R, borders, *step.shared)
    for _ in range(2 if HAS_GPU else 1):
        shared_prefix_decode(*given, out, counters, *scoring)
        assert not bool(counters.any())
        assert float((out.double().cpu() - expected).abs().max()) <= TOLERANCE[step.q_RNH.dtype]


@pytest.mark.parametrize("name", CASES)
def test_rows_get_what_they_get_alone(device: str, name: str) -> None:
    check(make_step(*CASES[name], device=device), 5 if name == "chunks" else 40)


@pytest.mark.parametrize("heads", [(7, 1, 64), (2, 2, 256), (20, 4, 24)])
def test_head_shapes_and_soft_caps(device: str, heads: tuple[int, int, int]) -> None:
    check(make_step([300, 290, 5], [SharedGroup((0, 1), 272)], heads, device=device), 9, softcap=4.0)


@pytest.mark.skipif(not HAS_GPU, reason="needs a GPU: interpreted, it takes minutes")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [(32, 8, 128), (16, 8, 128), (4, 1, 256), (32, 8, 64)])
def test_many_rows_behind_a_long_beginning(device: str, dtype: torch.dtype, heads: tuple) -> None:
    rng = random.Random(3)
    lens = [1024 + rng.randint(1, 200) for _ in range(40)] + [rng.randint(1, 900) for _ in range(8)] + [0] * 3
    groups = [SharedGroup(tuple(range(0, 40, 2)), 1024), SharedGroup(tuple(range(1, 40, 2)), 512)]
    programs = num_programs(torch.device("cuda"))
    for found in (groups, groups[:1], [SharedGroup(tuple(range(40)), 1024)], []):
        check(make_step(lens, found, heads, programs=264, dtype=dtype, device=device), programs)
