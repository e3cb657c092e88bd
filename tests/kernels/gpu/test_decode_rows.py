"""Do the kernels around a captured step look up and append what their definitions do, padding left alone?"""

from __future__ import annotations

import math

import pytest
import torch

from slipstream.kernels.decode_inputs import decode_inputs
from slipstream.kernels.greedy_append import greedy_append
from slipstream.kernels.span_inputs import span_inputs
from tests.kernels.gpu.conftest import HAS_GPU, has_interpreter

if HAS_GPU or has_interpreter():
    from slipstream.kernels.gpu import decode_inputs as inputs_file
    from slipstream.kernels.gpu import greedy_append as greedy_file
    from slipstream.kernels.gpu import span_inputs as spans_file


def test_decode_inputs(device: str) -> None:
    page_tokens, rows, groups = 4, 6, 2
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 1000, (rows, 1001), generator=generator).int().to(device)
    lengths = torch.tensor([1, 4, 5, 600, 30, 999], device=device)
    tables = torch.randint(1, 50, (groups, rows, 251), generator=generator).int().to(device)
    # Row 4's start is the host's bound, one more than what is there; row 2 runs an earlier token.
    plan = torch.tensor([[3, 4, -1, 0, 2, 5], [599, 30, 0, 0, 2, 998]], device=device)
    filled = []
    for function in (inputs_file.decode_inputs, decode_inputs):
        targets = [torch.full((6,), 77, device=device) for _ in range(3)]
        targets.append(torch.full((groups, 6), 77, device=device))
        targets.append(torch.full((groups, 6, 251), 77, dtype=torch.int32, device=device))
        function(plan, tokens, lengths, tables, page_tokens, *targets)
        filled.append(targets)
    for given, expected in zip(*filled, strict=True):
        assert torch.equal(given, expected)
    token_ids, positions, seq_lens, slots, table = filled[0]
    assert positions.tolist() == [599, 29, 0, 0, 2, 998] and seq_lens.tolist() == [600, 30, 0, 1, 3, 999]
    assert token_ids[0] == tokens[3, 599] and slots[:, 2].tolist() == [-1, -1]
    assert table[1, 0, :150].equal(tables[1, 3, :150]) and table[1, 0, 150:].eq(77).all()


@pytest.mark.parametrize("vocab", [5, 4096, 9001])
def test_greedy_append(device: str, vocab: int) -> None:
    lines = 8
    logits = torch.randn(lines, vocab, generator=torch.Generator().manual_seed(vocab))
    logits[1, 3] = logits[1, vocab - 1] = 9.0
    logits[2, 4] = math.nan
    logits[3, 2] = math.inf
    logits[4] = -math.inf
    logits[5, 1:], logits[7] = -math.inf, math.nan
    # What nobody wants is not looked at, however bad it is.
    rows = torch.tensor([2, 0, 1, 4, 5, -1, 3, -1], device=device)
    made = []
    for function in (greedy_file.greedy_append, greedy_append):
        tokens = torch.zeros(6, 12, dtype=torch.int32, device=device)
        lengths = torch.arange(3, 9, device=device)
        out = torch.full((2, lines), 77, device=device)
        function(logits.to(device), rows, tokens, lengths, out)
        made.append((tokens, lengths, out))
    for given, expected in zip(*made, strict=True):
        assert torch.equal(given, expected)
    tokens, lengths, out = made[0]
    assert out[1].tolist() == [0, 0, 1, 1, 2, 0, 0, 0]
    assert out[0, [1, 2, 3, 4, 5, 7]].tolist() == [3, 0, 0, 0, 0, 0]
    assert out[0, 6] == int(logits[6].argmax()) == tokens[3, 6]
    assert lengths.tolist() == [4, 5, 6, 7, 8, 9]


def test_span_inputs(device: str) -> None:
    """Two one-token rows, of which one is nobody's, beside three spans of up to four, with padding behind."""
    page_tokens, rows, groups, num_tokens, num_spans = 4, 6, 2, 300, 4
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, 1000, (rows, 1001), generator=generator).int().to(device)
    tables = torch.randint(1, 50, (groups, rows, 251), generator=generator).int().to(device)
    plan = torch.tensor([[3, -1, 1, 5, 0, -1], [8, 0, 0, 700, 31, 0]], device=device)
    counts = [2, 150, 129, 0]
    query_start = torch.tensor([0, 1, 2, *(2 + sum(counts[: i + 1]) for i in range(4))], device=device)
    line = torch.full((num_tokens,), -1, device=device)
    line[: sum(counts)] = torch.arange(2, 6).repeat_interleave(torch.tensor(counts)).to(device)
    filled = []
    for function in (spans_file.span_inputs, span_inputs):
        ids, positions = (torch.full((num_tokens,), 77, device=device) for _ in range(2))
        lens = torch.full((num_spans,), 77, device=device)
        # As in a step, slots are the end of wider lines.
        slots = torch.full((groups, num_tokens + 2), 77, device=device)[:, 2:]
        table = torch.full((groups, num_spans, 251), 77, dtype=torch.int32, device=device)
        function(plan, query_start, line, tokens, tables, page_tokens, ids, positions, lens, slots, table)
        filled.append((ids, positions, lens, slots, table))
    for given, expected in zip(*filled, strict=True):
        assert torch.equal(given, expected)
    ids, positions, lens, slots, table = filled[0]
    assert lens.tolist() == [2, 850, 160, 0] and positions[:4].tolist() == [0, 1, 700, 701]
    assert ids[2:152].equal(tokens[5, 700:850].long()) and ids[281:].eq(0).all()
    assert slots[1, 152] == tables[1, 0, 7] * 4 + 3 and slots[:, 281:].eq(-1).all()
    assert table[0, 1, :213].equal(tables[0, 5, :213]) and table[0, 1, 213:].eq(77).all()
    assert table[:, 3].eq(77).all()
