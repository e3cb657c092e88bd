"""Logprobs are the raw log-softmax, with the rank and the leaders that a full sort gives."""

import pytest
import torch

from slipstream.sampling.base import PackedLogprobs, SampleOutput
from slipstream.sampling.logprobs import pack_logprobs

VOCAB = 1009


def raw(rows=4, seed=0):
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 4


def output(x, ids, num_top, status=None):
    token_ids = torch.tensor(ids)
    status_R = torch.tensor(status or [0] * len(ids), dtype=torch.int8)
    packed = pack_logprobs(x, token_ids, status_R, num_top=max(num_top))
    table = PackedLogprobs(packed, {i: i for i in range(len(ids))}, dict(enumerate(num_top)))
    return SampleOutput(token_ids, status_R, table)


@pytest.mark.parametrize("k", [0, 1, 5, 64])
def test_equal_to_log_softmax(k):
    x, ids = raw(), [5, 77, 1008, 0]
    expected = x.double().log_softmax(-1)
    got = output(x, ids, [k] * 4)
    for i, token in enumerate(ids):
        entry = got.logprobs_by_row().get(i)
        assert entry.token_id == token
        # float32 exp in the normaliser: 1e-6 absolute (test_weights).
        assert entry.logprob == pytest.approx(expected[i, token].item(), abs=1e-6)
        assert entry.rank == int((x[i] > x[i, token]).sum()) + 1
        leaders = x[i].topk(k)
        assert [t for t, _ in entry.top] == leaders.indices.tolist()
        assert [v for _, v in entry.top] == pytest.approx(expected[i][leaders.indices].tolist(), abs=1e-6)


def test_each_row_gets_the_number_it_asked_for():
    got = output(raw(), [1, 2, 3, 4], [0, 3, 1, 2])
    assert [len(got.logprobs_by_row().get(i).top) for i in range(4)] == [0, 3, 1, 2]


def test_ties_share_a_rank_and_lead_by_id():
    x = torch.zeros(1, VOCAB)
    entry = output(x, [500], [3]).logprobs_by_row().get(0)
    assert entry.rank == 1 and [t for t, _ in entry.top] == [0, 1, 2]


def test_masked_tokens_are_minus_infinity():
    x = raw(1)
    x[0, 9] = -torch.inf
    assert output(x, [9], [0]).logprobs_by_row().get(0).logprob == -torch.inf


def test_who_did_not_ask_or_failed_gets_none():
    x = raw(2)
    x[1] = torch.nan
    got = output(x, [4, 0], [2, 2], status=[0, 1])
    assert got.logprobs_by_row().get(0) is not None and got.logprobs_by_row().get(1) is None
    assert got.logprobs_by_row().get(7) is None
    assert SampleOutput(torch.tensor([1]), torch.zeros(1, dtype=torch.int8)).logprobs_by_row().get(0) is None
