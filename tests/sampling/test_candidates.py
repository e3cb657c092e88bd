"""The leaders of a row come in one order, (logit down, id up), whatever the number asked for."""

import numpy as np
import pytest
import torch

from slipstream.sampling.candidates import BLOCK, greatest, heavy, leading

VOCABS = [1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 1000, 20 * BLOCK, 20_011]


def logits_with_ties(rows, vocab, seed=0):
    """bfloat16 logits as float32: many are equal; some are masked."""
    x = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 3
    x = x.to(torch.bfloat16).float()
    x[:, 1::7] = -torch.inf
    return x


def in_order(row):
    return np.lexsort((np.arange(len(row)), -row.numpy()))


@pytest.mark.parametrize("vocab", VOCABS)
def test_greatest_is_the_first_maximum(vocab):
    x = logits_with_ties(6, vocab)
    x[0] = 1.0
    x[1] = -torch.inf
    values, ids = greatest(x)
    assert ids.tolist() == [int(in_order(row)[0]) for row in x]
    assert torch.equal(values, x.amax(-1))


def test_greatest_shows_nan():
    x = torch.zeros(2, 1000)
    x[1, 777] = torch.nan
    values, _ = greatest(x)
    assert values[0] == 0 and values[1].isnan()


@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("k", [1, 3, 20, 200, 10**9])
def test_leading_is_a_prefix_of_the_order(vocab, k):
    k = min(k, vocab)
    x = logits_with_ties(5, vocab)
    # A leader in the last, shorter block must not be found twice.
    x[2, -1] = 50.0
    values, ids = leading(x, k)
    for i, row in enumerate(x):
        expected = in_order(row)[:k]
        assert ids[i].tolist() == expected.tolist()
        assert torch.equal(values[i], row[torch.from_numpy(expected)])


def test_leading_of_a_uniform_row_takes_the_lowest_ids():
    _, ids = leading(torch.zeros(1, 50_000), 10)
    assert ids[0].tolist() == list(range(10))


@pytest.mark.parametrize("nan", [torch.nan, -torch.nan])
def test_leading_of_nan_still_names_tokens(nan):
    vocab = 320 * BLOCK + 1
    # 39 blocks of NaN are searched, and the last one for its single token; negative NaN stands behind the
    # places that pad that block.
    x = torch.zeros(1, vocab)
    x[0, : 39 * BLOCK] = nan
    x[0, -1] = 1.0
    _, ids = leading(x, 40)
    assert ids.min() >= 0 and ids.max() < vocab


def test_heavy_orders_the_marked_tokens_and_pads():
    x = logits_with_ties(4, 500)
    marked = x > torch.tensor([[4.0], [2.0], [-9.0], [1000.0]])
    ids, is_padding = heavy(x, marked)
    for i, row in enumerate(x):
        expected = [t for t in in_order(row) if marked[i, t]] or [0]
        assert ids[i][~is_padding[i]].tolist() == expected
