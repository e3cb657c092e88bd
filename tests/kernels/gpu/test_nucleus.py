"""Does the nucleus kernel draw the token that an order and exact sums give, wherever it looks for it?

The definition here is written out row by row with Python's integers. `tests/sampling/test_nucleus_gpu.py`
holds the kernel against the sampler's own definition at real sizes.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from slipstream.sampling.weights import scale_bits
from tests.kernels.gpu.conftest import HAS_GPU, has_interpreter
from tests.kernels.gpu.plain_libdevice import replace_libdevice

if HAS_GPU or has_interpreter():
    from slipstream.kernels.gpu import nucleus, row_logprobs


# The interpreter's numpy speaks of infinities that a GPU computes with in silence.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")


@pytest.fixture(autouse=True)
def exponential(monkeypatch: pytest.MonkeyPatch) -> None:
    replace_libdevice(monkeypatch, nucleus, row_logprobs)


def masses(x: torch.Tensor, temperature: float, bits: int) -> list[int]:
    """Return one row's integer masses, by the exponential that the kernel has."""
    scaled = (x - x.max()) / torch.tensor(temperature, dtype=torch.float32, device=x.device)
    raised = scaled.exp() if HAS_GPU else torch.from_numpy(np.exp(scaled.numpy()))
    return [int(mass) for mass in (raised * 2.0**bits).tolist()]


def drawn(x: torch.Tensor, columns: dict[str, torch.Tensor], row: int, bits: int) -> int:
    """Return the token of one row, by the definition."""
    temperature, top_p, min_p, uniform = (
        float(columns[name][row]) for name in ("temperature", "top_p", "min_p", "uniform")
    )
    weights = masses(x, temperature, bits)
    values = x.tolist()
    order = sorted(range(len(values)), key=lambda i: (-values[i], np.signbit(values[i]), i))
    bound = np.float64(top_p) * np.float64(sum(weights))
    least = int(np.ceil(min_p * 2.0**bits))
    kept: list[int] = []
    before = 0
    for place in order:
        if kept and not (np.float64(before) < bound and weights[place] >= least):
            break
        kept.append(place)
        before += weights[place]
    target = min(int(np.float64(uniform) * np.float64(before)), before - 1)
    for place in kept:
        target -= weights[place]
        if target < 0:
            return place
    raise AssertionError("the masses of the kept tokens exceed every target")


def logits(kind: str, rows: int, vocab: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(len(kind) + vocab)
    x = torch.randn(rows, vocab, generator=generator) * 2
    if kind == "peaked":
        x[:, vocab // 3] += 12
    elif kind == "rounded":
        x = (x * 4).round() / 4
    elif kind == "equal":
        x = torch.full_like(x, 1.5)
    elif kind == "zeros of both signs":
        x[:, ::3], x[:, 1::3] = 0.0, -0.0
        x = x.clamp(max=0.0)
    elif kind == "masked":
        x[:, torch.randperm(vocab, generator=generator)[: vocab // 2]] = -torch.inf
    return x


def call(x: torch.Tensor, columns: dict[str, torch.Tensor], device: str, capacity: int) -> list[int]:
    bits = scale_bits(x.shape[1])
    least = (columns["min_p"] * 2.0**bits).ceil().to(torch.int64)
    # The sampler has columns of wider tensors.
    wide = torch.stack((columns["uniform"], columns["top_p"], torch.zeros_like(columns["top_p"])), dim=1)
    uniform, top_p, _ = wide.to(device).unbind(1)
    token_ids, status = nucleus.draw_nucleus(
        x.to(device),
        columns["temperature"].to(device),
        top_p,
        least.to(device) if bool(least.any()) else None,
        uniform,
        bits=bits,
        capacity=capacity,
    )
    largest = x.amax(-1)
    bad = torch.where(largest < torch.inf, 0, 1).where(largest != -torch.inf, 2)
    assert status.tolist() == bad.tolist()
    return token_ids.tolist()


def columns_of(rows: int, seed: int, *, has_min: bool) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(rows, generator=generator, dtype=torch.float64)
    uniform[0] = 0.0 if rows > 2 else 0.37
    top_p = 1 - 0.6 * torch.rand(rows, generator=generator, dtype=torch.float64) ** 2
    top_p[rows - 2] = 0.95
    if rows > 2:
        top_p[0], top_p[2] = 1e-9, 1 - 1e-15
    return {
        "temperature": torch.rand(rows, generator=generator) * 1.5 + 0.02,
        "top_p": top_p,
        "min_p": torch.rand(rows, generator=generator, dtype=torch.float64) * (0.1 if has_min else 0.0),
        "uniform": uniform,
    }


@pytest.mark.parametrize(("vocab", "has_min"), [(17, True), (5003, False)])
@pytest.mark.parametrize("kind", ["smooth", "peaked", "rounded", "equal", "zeros of both signs", "masked"])
def test_tokens_are_those_of_the_definition(device: str, kind: str, vocab: int, has_min: bool) -> None:
    rows = 3 if vocab < 100 else 2
    x, columns = logits(kind, rows, vocab), columns_of(rows, vocab, has_min=has_min)
    bits = scale_bits(vocab)
    x_there = x.to(device)
    expected = [drawn(x_there[row], columns, row, bits) for row in range(rows)]
    assert call(x, columns, device, 8192) == expected


@pytest.mark.parametrize("capacity", [8, 256])
def test_lists_that_hold_too_little(device: str, capacity: int) -> None:
    """Then the whole row is searched, for one question or for both."""
    x, columns = logits("rounded", 2, 2100), columns_of(2, 9, has_min=False)
    bits = scale_bits(x.shape[1])
    x_there = x.to(device)
    expected = [drawn(x_there[row], columns, row, bits) for row in range(2)]
    assert call(x, columns, device, capacity) == expected


def test_a_bad_row_does_no_harm(device: str) -> None:
    x, columns = logits("smooth", 4, 300), columns_of(4, 1, has_min=False)
    expected = call(x, columns, device, 128)
    x[1], x[2, 7] = -torch.inf, torch.inf
    given = call(x, columns, device, 128)
    assert given == [expected[0], 0, 0, expected[3]]
    x[1], x[2, 7] = torch.nan, torch.nan
    assert call(x, columns, device, 128) == given


def test_the_largest_may_stand_far_above_what_was_looked_at_first(device: str) -> None:
    """Masses are estimated relative to the first tokens' largest, which may be none at all."""
    vocab = 5003
    x, columns = logits("smooth", 3, vocab), columns_of(3, 2, has_min=False)
    columns["temperature"][:] = 0.3
    x[0, 4500:4510] = 90.0
    x[1, :4400], x[1, 4400:] = -torch.inf, x[1, 4400:] - 300
    x[2, 4800] = 12.0
    x_there, bits = x.to(device), scale_bits(vocab)
    expected = [drawn(x_there[row], columns, row, bits) for row in range(3)]
    assert call(x, columns, device, 8192) == expected


@pytest.mark.parametrize("num_top", [0, 1, 5])
def test_logprobs_of_rows(device: str, num_top: int) -> None:
    x = logits("rounded", 3, 5003)
    x[1, 9] = -torch.inf
    bits = scale_bits(x.shape[1])
    tokens, status = torch.tensor([5, 9, 77]), torch.tensor([0, 0, 2], dtype=torch.int8)
    largest, places = x.amax(-1), torch.sort(x, dim=-1, descending=True, stable=True).indices[:, :num_top]
    listed = (x.gather(1, places).to(device), places.to(device)) if num_top else None
    packed = row_logprobs.row_logprobs(
        x.to(device), tokens.to(device), status.to(device), largest.to(device), listed, bits=bits
    ).cpu()
    chosen = x.gather(1, tokens[:, None])
    assert packed[:, 0].tolist() == tokens.tolist() and packed[:, 3].tolist() == status.tolist()
    assert torch.equal(packed[:, 2].long(), (x > chosen).sum(-1) + 1)
    assert torch.equal(packed[:, 4 : 4 + num_top].long(), places)
    totals = torch.tensor([sum(masses(row, 1.0, bits)) for row in x.to(device)], dtype=torch.float64).log()
    norm = (largest.double() + totals - bits * math.log(2.0))[:, None]
    # Exact masses; their logarithm may differ in the last bit, and so may sums of some 40.
    torch.testing.assert_close(packed[:, 1:2], chosen - norm, rtol=0, atol=1e-13)
    torch.testing.assert_close(packed[:, 4 + num_top :], x.gather(1, places) - norm, rtol=0, atol=1e-13)
