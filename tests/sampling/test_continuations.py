"""Do a row's continuations hold the model's own log-probabilities, over the tokens that its masks leave?"""

from __future__ import annotations

import pytest
import torch

from slipstream.core.sampling_params import RowSampling
from slipstream.sampling.continuations import pack_continuations, unpack_continuations
from slipstream.sampling.sampler import Sampler


def logits(rows: int, vocab: int, *, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 3


@pytest.mark.parametrize("vocab", [7, 130, 32_003])
def test_leading_tokens_with_raw_logprobs_and_ranks(vocab: int) -> None:
    raw = logits(3, vocab)
    allowed = raw.clone()
    banned = raw.topk(2).indices[:, 1]
    allowed[torch.arange(3), banned] = -torch.inf
    lines = pack_continuations(raw, allowed, count=4, with_ranks=True).tolist()
    expected = raw.double().log_softmax(-1)
    for row, line in enumerate(lines):
        found = unpack_continuations(line, 4)
        assert found.token_ids == allowed[row].topk(4).indices.tolist()
        assert found.ranks == [1, 3, 4, 5]
        # log_softmax sums in another order, in float64 too.
        assert found.logprobs == pytest.approx(expected[row, found.token_ids].tolist(), abs=1e-6)
        short = unpack_continuations(line, 2)
        assert short.token_ids == found.token_ids[:2] and short.logprobs == found.logprobs[:2]


def sampler(sampled: list[RowSampling], vocab: int) -> Sampler:
    made = Sampler(max_rows=8, vocab_size=vocab, device="cpu")
    for row, sampling in enumerate(sampled):
        made.add(row, sampling, [1, 2], 2, 7, 0)
    return made


def test_neighbours_and_their_counts_change_nothing() -> None:
    vocab = 300
    mixed = [
        RowSampling(num_candidates=3, bad_ids=(5, 6)),
        RowSampling(temperature=1.0, logprobs=2),
        RowSampling(num_candidates=9, min_tokens=2, stop_ids=(0, 4), logprobs=1),
        RowSampling(),
        RowSampling(num_candidates=4, allowed_ids=(1, 2, 3, 9)),
    ]
    for step in range(4):
        x = logits(5, vocab, seed=step)
        together = sampler(mixed, vocab).sample(x.clone(), list(range(5)))
        found = together.continuations_by_row()
        assert list(found) == [0, 2, 4]
        for row in found:
            alone = sampler(mixed, vocab).sample(x[row : row + 1].clone(), [row]).continuations_by_row()
            assert alone[0].token_ids == found[row].token_ids
            assert alone[0].logprobs == found[row].logprobs
        assert len(found[0].token_ids) == 3 and not {5, 6}.intersection(found[0].token_ids)
        assert not {0, 4}.intersection(found[2].token_ids)
        assert set(found[4].token_ids) == {1, 2, 3, 9}
        # The token that is sampled is the first of them.
        tokens = together.tokens()
        assert all(tokens[row] == one.token_ids[0] for row, one in found.items())


def test_without_a_search_there_are_none() -> None:
    output = sampler([RowSampling(logprobs=1)], 50).sample(logits(1, 50), [0])
    assert output.continuations is None and output.continuations_by_row() == {}
