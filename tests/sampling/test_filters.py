"""Each path draws from the analytic distribution, and from the set that transformers keeps.

Noise on an even grid of n points gives every token its probability to within 1/n, so the distributions are
compared without statistics; the chi-square test of the whole sampler is in test_sampler.py.
"""

import numpy as np
import pytest
import torch
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from slipstream.sampling import filters
from slipstream.sampling.filters import FilterParams, draw_full, draw_top_k, draw_top_p

GRID = 4000
CASES = [
    {"temperature": 1.0},
    {"temperature": 0.25},
    {"temperature": 3.0},
    {"temperature": 0.9, "min_p": 0.05},
    {"temperature": 1.5, "min_p": 1.0},
    {"temperature": 1.0, "top_k": 1},
    {"temperature": 0.8, "top_k": 7},
    {"temperature": 1.3, "top_k": 40, "min_p": 0.02},
    {"temperature": 1.0, "top_p": 0.9},
    {"temperature": 2.0, "top_p": 0.999},
    {"temperature": 0.7, "top_p": 1e-6},
    {"temperature": 1.2, "top_k": 20, "top_p": 0.8},
    {"temperature": 0.6, "top_k": 30, "top_p": 0.95, "min_p": 0.1},
    {"temperature": 1.1, "top_p": 0.9, "min_p": 0.03},
]


def logits(vocab, seed=1):
    return torch.randn(1, vocab, generator=torch.Generator().manual_seed(seed)) * 2.5


def params_for(case, n):
    return FilterParams(
        temperature_N=torch.full((n,), case["temperature"]),
        top_p_N=torch.full((n,), case.get("top_p", 1.0), dtype=torch.float64),
        min_p_N=torch.full((n,), case.get("min_p", 0.0), dtype=torch.float64),
        top_k_N=torch.full((n,), case.get("top_k", 0)),
    )


def drawn(x, case, uniform):
    """Draw once per noise number, from one row or from a row each."""
    n = len(uniform)
    params, x = params_for(case, n), x.expand(n, -1)
    if "top_k" in case:
        return draw_top_k(x, uniform, params, max_k=case["top_k"])
    if "top_p" in case:
        return draw_top_p(x, uniform, params)
    return draw_full(x, uniform, params, has_min_p="min_p" in case)


def on_a_grid(x, case, n=GRID):
    """Return the share of each token over an even grid of noise."""
    uniform = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    return torch.bincount(drawn(x, case, uniform), minlength=x.shape[1]).double() / n


def by_transformers(x, case):
    scores = TemperatureLogitsWarper(case["temperature"])(None, x)
    if "top_k" in case:
        scores = TopKLogitsWarper(case["top_k"])(None, scores)
    if "top_p" in case:
        scores = TopPLogitsWarper(case["top_p"])(None, scores)
    if "min_p" in case:
        scores = MinPLogitsWarper(case["min_p"])(None, scores)
    return scores.double().softmax(-1)[0]


def by_formula(x, case):
    """The definition, token by token, in float64."""
    p = np.exp((x[0].double().numpy() - x.max().item()) / case["temperature"])
    order = np.argsort(-p, kind="stable")[: case.get("top_k", len(p))]
    share = p[order] / p[order].sum()
    before = np.cumsum(share) - share
    kept = order[(before < case.get("top_p", 1.0)) & (share >= case.get("min_p", 0.0) * share[0])]
    result = np.zeros_like(p)
    result[kept] = p[kept] / p[kept].sum()
    return torch.from_numpy(result)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("vocab", [11, 321])
def test_shares_are_the_analytic_and_transformers_distribution(vocab, case):
    x = logits(vocab)
    shares = on_a_grid(x, case)
    for expected in (by_formula(x, case), by_transformers(x, case)):
        # A token's share of an even grid is off by at most one point at each end of its interval.
        assert (shares - expected).abs().max() <= 2 / GRID
        assert not shares[expected == 0].any(), "a token outside the kept set was drawn"


def test_a_flat_distribution_needs_more_than_the_first_candidates():
    x = logits(5000) * 0.1
    case = {"temperature": 1.0, "top_p": 0.7}
    kept = by_formula(x, case)
    assert (kept > 0).sum() > filters.FIRST_CANDIDATES
    uniform = (torch.arange(500, dtype=torch.float64) + 0.5) / 500
    ids = drawn(x, case, uniform)
    # The place of each draw in the descending order, against the inverse of the float64 cumulative sum.
    order = torch.argsort(-x[0], stable=True)
    expected = torch.searchsorted(kept[order].cumsum(0), uniform, right=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order))
    # float32 exp shifts a boundary by 1e-6 of the mass; a token here has about 3e-4, so at most one place.
    assert (place[ids] - expected).abs().max() <= 1
    assert (place[ids] == expected).sum() >= 495


def test_accelerators_order_everything_and_agree(monkeypatch):
    """The path without a wait for the device draws the same tokens as the CPU's short lists."""
    x, case = logits(700), {"temperature": 1.4, "top_p": 0.93}
    uniform = (torch.arange(500, dtype=torch.float64) + 0.5) / 500
    short = drawn(x, case, uniform)
    monkeypatch.setattr(filters, "FIRST_CANDIDATES", 700)
    assert torch.equal(drawn(x, case, uniform), short)


def test_uniform_ties_keep_the_smallest_set_and_the_lowest_ids():
    x = torch.zeros(1, 10)
    assert on_a_grid(x, {"temperature": 1.0, "top_k": 3}).gt(0).nonzero().flatten().tolist() == [0, 1, 2]
    assert on_a_grid(x, {"temperature": 1.0, "top_p": 0.35}).gt(0).sum() == 4
    assert on_a_grid(x, {"temperature": 1.0, "min_p": 1.0}).gt(0).sum() == 10


def test_masked_tokens_are_never_drawn():
    x = logits(50)
    x[0, ::2] = -torch.inf
    for case in CASES:
        assert not on_a_grid(x, case, n=1000)[::2].any(), case


@pytest.mark.parametrize("case", CASES, ids=str)
def test_extreme_logits_stay_finite(case):
    x = torch.tensor([[3e38, -3e38, 0.0, 3e38, -torch.inf]])
    ids = drawn(x, case, torch.tensor([0.0, 0.3, 1 - 2**-53], dtype=torch.float64))
    assert set(ids.tolist()) <= {0, 3}


def test_slicing_rows_changes_nothing(monkeypatch):
    x = torch.randn(40, 300, generator=torch.Generator().manual_seed(3)) * 3
    uniform = torch.rand(40, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    for case in CASES:
        whole = drawn(x, case, uniform)
        monkeypatch.setattr(filters, "CPU_SLICE_ELEMENTS", 1000)
        assert len(filters.slices(x)) == 14
        assert torch.equal(drawn(x, case, uniform), whole)
        monkeypatch.undo()
