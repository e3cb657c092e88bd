"""Are the reference's pieces worked out once a step, within their bounds, and its op traceable?"""

from __future__ import annotations

import itertools

import torch

from slipstream.attention import torch_reference
from slipstream.attention.base import AttentionSpec
from slipstream.attention.torch_reference import TorchReference, group_rows
from tests.attention.dense import Case, make_batch

CASE = Case(spans=((1, 30), (1, 41), (9, 20)), block_tokens=8)


def test_layers_of_a_group_share_the_pieces(monkeypatch) -> None:
    calls = []
    real = torch_reference.cut_pieces
    monkeypatch.setattr(torch_reference, "cut_pieces", lambda *a: calls.append(1) or real(*a))
    keys = [torch.randn(n, 2, 64) for _, n in CASE.spans]
    batch, layer = make_batch(CASE, TorchReference(), keys, keys)
    q, k = torch.randn(11, 4, 64), torch.randn(11, 2, 64)
    for window in (0, 0, 5, 0, 5):
        spec = AttentionSpec(layer_idx=layer, scale=0.1, num_kv_heads=2, head_dim=64, window=window)
        batch.attention_plan.run(q, k, k, batch, spec)
    assert len(calls) == 2


def test_rows_are_grouped_within_the_bound() -> None:
    lens = [5, 100, 7, 7, 7, 300, 8]
    groups = list(group_rows(lens, 8, 0, 20))
    assert groups[0][0] == 0 and groups[-1][1] == len(lens)
    assert all(a[1] == b[0] for a, b in itertools.pairwise(groups))
    for first, last in groups:
        blocks = max(-(-n // 8) for n in lens[first:last]) * (last - first)
        assert blocks <= 20 or last - first == 1
    assert list(group_rows([], 8, 0, 20)) == []


def test_keys_are_stored_before_attending() -> None:
    """One new token per row, alone in its sequence: its output is its own value."""
    case = Case(spans=((1, 1), (1, 1)))
    nothing = [torch.zeros(1, 2, 64)] * 2
    batch, layer = make_batch(case, TorchReference(), nothing, nothing)
    spec = AttentionSpec(layer_idx=layer, scale=0.1, num_kv_heads=2, head_dim=64)
    v = torch.randn(2, 2, 64, generator=torch.Generator().manual_seed(1))
    out = batch.attention_plan.run(torch.randn(2, 4, 64), torch.randn(2, 2, 64), v, batch, spec)
    assert torch.equal(out, v.repeat_interleave(2, dim=1))


def test_nobody_elses_slots_are_written() -> None:
    keys = [torch.randn(n, 2, 64) for _, n in CASE.spans]
    batch, layer = make_batch(CASE, TorchReference(), keys, keys)
    before = batch.kv_pages[0].clone()
    spec = AttentionSpec(layer_idx=layer, scale=0.1, num_kv_heads=2, head_dim=64)
    batch.attention_plan.run(
        torch.randn(11, 4, 64), torch.ones(11, 2, 64), torch.ones(11, 2, 64), batch, spec
    )
    changed = ~torch.isclose(before, batch.kv_pages[0], rtol=0, atol=0, equal_nan=True)
    touched = changed.flatten(4).any(-1)
    assert not touched[:, 0].any()
    assert int(touched[:, layer].sum()) == 2 * 11


def test_an_empty_step_runs() -> None:
    batch, layer = make_batch(CASE, TorchReference(), *([[torch.zeros(n, 2, 64) for _, n in CASE.spans]] * 2))
    batch.attention_plan = TorchReference().plan(query_lens=[], max_seq_lens=[])
    batch.seq_lens = torch.zeros(0, dtype=torch.int32)
    batch.slot_mapping_T = [torch.zeros(0, dtype=torch.int64)]
    spec = AttentionSpec(layer_idx=layer, scale=0.1, num_kv_heads=2, head_dim=64)
    empty = torch.zeros(0, 2, 64)
    assert batch.attention_plan.run(torch.zeros(0, 4, 64), empty, empty, batch, spec).shape == (0, 4, 64)
