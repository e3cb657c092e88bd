"""Masses are exact integers, close to the softmax, and the draw follows them to the last token."""

import pytest
import torch

from slipstream.sampling.weights import BLOCK, draw, log_sum_exp, scale_bits, target_of, weigh


def logits(rows, vocab, scale=3.0, seed=0):
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


@pytest.mark.parametrize("vocab", [1, 2, 3, 1000, 49_152, 262_144, 2**20])
def test_no_total_overflows(vocab):
    total = weigh(
        torch.zeros(1, vocab), max_R=torch.zeros(1), temperature_R=None, bits=scale_bits(vocab)
    ).sum()
    assert total == vocab * 2 ** scale_bits(vocab) <= 2**62


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_weights_are_the_softmax(temperature):
    x = logits(4, 1003)
    weights = weigh(
        x, max_R=x.amax(-1), temperature_R=torch.full((4,), temperature), bits=scale_bits(1003)
    ).double()
    expected = (x.double() / temperature).softmax(-1)
    # float32 exp of arguments up to ~80: |argument| * 2^-24 relative error, about 5e-6.
    torch.testing.assert_close(weights / weights.sum(-1, keepdim=True), expected, rtol=1e-5, atol=1e-12)


def test_log_sum_exp():
    x = logits(5, 50_001, scale=8.0)
    # float32 exp: relative error of the sum below 1e-6, hence the same absolute error of its logarithm.
    torch.testing.assert_close(log_sum_exp(x, max_R=x.amax(-1)), x.double().logsumexp(-1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("width", [1, 2, 3, 63, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK, 1000])
def test_draw_is_the_inverse_of_the_cumulative_sum(width):
    generator = torch.Generator().manual_seed(width)
    weights = torch.randint(0, 4, (200, width), generator=generator)
    weights[:, -1] += 1
    u = torch.rand(200, dtype=torch.float64, generator=generator)
    u[:4] = torch.tensor([0.0, 1 - 2**-53, 0.5, 2**-53], dtype=torch.float64)
    ends = weights.cumsum(-1)
    target = (u * ends[:, -1].double()).floor().long()
    expected = [int((row <= t).sum()) for row, t in zip(ends, target, strict=True)]
    assert draw(weights, u).tolist() == expected


def test_a_token_without_mass_is_never_drawn():
    weights = torch.zeros(3, 1000, dtype=torch.int64)
    weights[:, 300] = 1
    weights[:, 700] = 2**60
    u = torch.tensor([0.0, 0.5, 1 - 2**-53], dtype=torch.float64)
    assert draw(weights, u).tolist() == [300, 700, 700]


def test_the_target_stays_below_the_total():
    total = torch.tensor([1, 2**53 - 1, 2**62, 2**62 - 1])
    u = torch.full((4,), 1 - 2**-53, dtype=torch.float64)
    target = target_of(u, total)
    assert (target < total).all() and (target >= 0).all()


@pytest.mark.parametrize("vocab", [5, 1001, 4099])
def test_rows_do_not_depend_on_their_number_or_place(vocab):
    x = logits(33, vocab)
    bits, t = scale_bits(vocab), torch.full((33,), 0.7)
    together = weigh(x, max_R=x.amax(-1), temperature_R=t, bits=bits)
    norms = log_sum_exp(x, max_R=x.amax(-1))
    for i in range(33):
        alone = x[i : i + 1].clone()
        assert torch.equal(
            weigh(alone, max_R=alone.amax(-1), temperature_R=t[:1], bits=bits), together[i : i + 1]
        )
        assert torch.equal(log_sum_exp(alone, max_R=alone.amax(-1)), norms[i : i + 1])
