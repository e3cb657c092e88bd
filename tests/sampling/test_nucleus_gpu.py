"""Does a GPU draw from the nucleus what ordering the vocabulary would draw, bit by bit?

One CUDA device. Logits are smooth, of few distinct values as bfloat16 heads give them, all equal, and masked.
"""

from __future__ import annotations

import pytest
import torch

from slipstream.kernels.registration import has_triton
from slipstream.sampling.filters import FilterParams, draw_top_p, draw_top_p_in_order
from slipstream.sampling.logprobs import pack_logprobs
from slipstream.sampling.weights import log_sum_exp, scale_bits, weigh

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not has_triton(), reason="the kernel is written in triton"),
]
ROWS = 37


def logits(kind: str, vocab: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(len(kind) + vocab)
    x = torch.randn(ROWS, vocab, generator=generator)
    if kind == "peaked":
        x = x * 8
    elif kind == "rounded":
        x = x.bfloat16().float()
    elif kind == "equal":
        x = torch.full_like(x, 1.5)
    elif kind == "zeros of both signs":
        x[:, ::3], x[:, 1::3] = 0.0, -0.0
    elif kind == "masked":
        x[:, torch.randperm(vocab, generator=generator)[: vocab // 2]] = -torch.inf
    return x.cuda()


def params() -> tuple[FilterParams, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    top_p = torch.rand(ROWS, generator=generator, dtype=torch.float64)
    top_p[:4] = torch.tensor([1e-9, 0.95, 1 - 1e-15, 0.999999])
    temperature = torch.rand(ROWS, generator=generator) * 2 + 0.02
    min_p = torch.where(top_p > 0.5, torch.rand(ROWS, generator=generator, dtype=torch.float64) * 0.2, 0.0)
    uniform = torch.rand(ROWS, generator=generator, dtype=torch.float64)
    uniform[::9] = 0.0
    # Columns of wider tensors, as a batch has them.
    top_p, min_p, uniform = torch.stack((top_p, min_p, uniform), dim=1).cuda().unbind(1)
    top_k = torch.zeros(ROWS, dtype=torch.int64, device="cuda")
    return FilterParams(temperature.cuda(), top_p, min_p, top_k), uniform


@pytest.mark.parametrize("vocab", [17, 1024, 50_257, 128_256])
@pytest.mark.parametrize("kind", ["smooth", "peaked", "rounded", "equal", "zeros of both signs", "masked"])
def test_tokens_are_those_of_the_order(kind: str, vocab: int) -> None:
    x, (given, uniform) = logits(kind, vocab), params()
    expected = draw_top_p_in_order(x.clone(), uniform, given)
    assert torch.equal(draw_top_p(x, uniform, given), expected)
    given.min_p_N.zero_()
    expected = draw_top_p_in_order(x.clone(), uniform, given)
    assert torch.equal(draw_top_p(x, uniform, given, has_min_p=False), expected)


def test_a_bad_row_does_no_harm() -> None:
    x, (given, uniform) = logits("smooth", 1024), params()
    expected = draw_top_p(x, uniform, given)
    x[3], x[5, 7], x[8] = torch.nan, torch.inf, -torch.inf
    drawn = draw_top_p(x, uniform, given)
    others = [row for row in range(ROWS) if row not in (3, 5, 8)]
    assert torch.equal(drawn[others], expected[others])
    assert bool(((drawn >= 0) & (drawn < 1024)).all())


@pytest.mark.parametrize("kind", ["smooth", "rounded", "masked"])
def test_log_masses_and_ranks(kind: str) -> None:
    x = logits(kind, 50_257)
    largest = x.amax(-1)
    chosen = torch.arange(ROWS, device="cuda") * 31
    packed = pack_logprobs(x, chosen, torch.zeros_like(chosen), num_top=3)
    own = x.gather(1, chosen[:, None])[:, 0]
    # Masses are integers, so their sum is the same in any order.
    bits = scale_bits(x.shape[1])
    total = weigh(x.clone(), max_R=largest, temperature_R=None, bits=bits).sum(-1)
    assert torch.equal(packed[:, 1], own - log_sum_exp(x.clone(), max_R=largest))
    assert torch.equal(packed[:, 2].long(), (x > own[:, None]).sum(-1) + 1)
    assert bool((total > 0).all())
