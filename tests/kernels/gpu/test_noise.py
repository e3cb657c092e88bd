"""Is the kernel's noise Philox's, bit by bit?"""

from __future__ import annotations

import pytest
import torch

from slipstream.sampling.philox import Philox, key_words
from tests.kernels.gpu.conftest import HAS_GPU, has_interpreter

if HAS_GPU or has_interpreter():
    from slipstream.kernels.gpu.noise import uniform


@pytest.mark.parametrize("num_rows", [1, 300])
def test_noise_is_that_of_the_definition(device: str, num_rows: int) -> None:
    generator = torch.Generator().manual_seed(num_rows)
    seeds = [0, 2**64 - 1, *torch.randint(0, 2**62, (num_rows + 4,), generator=generator).tolist()]
    ints = torch.tensor([[-7, *key_words(seed), row % 5, -7] for row, seed in enumerate(seeds)])
    position = torch.randint(0, 2**33, (len(seeds),), generator=generator)
    position[0] = 0
    rows = torch.randperm(len(seeds), generator=generator)[:num_rows]
    expected = Philox(torch.device("cpu")).uniform(ints[rows, 1:3].T, ints[rows, 3], position[rows])
    given = uniform(rows.to(device), ints.to(device), position.to(device), key_column=1, sample_column=3)
    assert torch.equal(given.cpu(), expected)
    assert bool(((given >= 0) & (given < 1)).all())
