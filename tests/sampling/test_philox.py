"""Philox4x32-10 gives the published words, and uniform numbers that look uniform."""

import pytest
import torch
from scipy import stats

from slipstream.sampling.philox import Philox, key_words

PHILOX = Philox(torch.device("cpu"))

# Known answers of the authors' Random123 distribution (kat_vectors, philox4x32 10): counter, key, words.
KNOWN = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


def plain_philox(counter, key):
    """The algorithm as the paper writes it, in Python's unbounded integers."""
    c, k = list(counter), list(key)
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * c[0], 2**32)
        high1, low1 = divmod(0xCD9E8D57 * c[2], 2**32)
        c = [high1 ^ c[1] ^ k[0], low1, high0 ^ c[3] ^ k[1], low0]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_known_answers(counter, key, words):
    got = PHILOX.words(torch.tensor(counter)[:, None], torch.tensor(key)[:, None])
    assert got[:, 0].tolist() == words == plain_philox(counter, key)


def test_a_batch_gives_each_counter_its_own_words():
    generator = torch.Generator().manual_seed(0)
    counter = torch.randint(0, 2**32, (4, 50), generator=generator)
    key = torch.randint(0, 2**32, (2, 50), generator=generator)
    expected = [plain_philox(c, k) for c, k in zip(counter.T.tolist(), key.T.tolist(), strict=True)]
    assert PHILOX.words(counter, key).T.tolist() == expected


def test_uniform_numbers_carry_53_bits_of_the_first_two_words():
    low, high = key_words(2**64 - 5)
    got = PHILOX.uniform(torch.tensor([[low], [high]]), torch.tensor([3]), torch.tensor([70_000]))
    words = plain_philox([70_000, 3, 0, 0], [2**32 - 5, 2**32 - 1])
    assert got.item() == ((words[0] >> 5) * 2**26 + (words[1] >> 6)) / 2**53


@pytest.mark.parametrize("varied", ["position", "sample_idx", "seed"])
def test_uniform_numbers_are_uniform_along_each_coordinate(varied):
    n = 20_000
    steps = torch.arange(n)
    zeros = torch.zeros(n, dtype=torch.int64)
    key = torch.stack((steps if varied == "seed" else zeros, zeros))
    u = PHILOX.uniform(
        key, steps if varied == "sample_idx" else zeros, steps if varied == "position" else zeros
    )
    assert u.min() >= 0.0 and u.max() < 1.0
    # The numbers are fixed, so this p-value is too; a stuck high bit drives it below 1e-10.
    assert stats.kstest(u.numpy(), "uniform").pvalue > 1e-3
    # Neighbours are uncorrelated: the standard error of a lag-1 correlation of 20,000 numbers is 0.007.
    assert abs(torch.corrcoef(torch.stack((u[1:], u[:-1])))[0, 1]) < 0.03
