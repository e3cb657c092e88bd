"""Do rows draw inside a step what the sampler draws for them outside, in whatever order they do either?

Where there is no GPU the definition draws; `tests/kernels/gpu/test_draw_append.py` holds the kernels to it.
"""

from __future__ import annotations

import torch

from slipstream.core.sampling_params import RowSampling
from slipstream.sampling.sampler import Sampler

VOCAB, ROWS, LONGEST = 700, 8, 16
KINDS = [
    RowSampling(temperature=1.0),
    RowSampling(temperature=0.8, top_p=0.9),
    RowSampling(temperature=1.3, min_p=0.05),
    RowSampling(temperature=0.9, top_p=0.95, min_p=0.1),
    RowSampling(temperature=1e-3, top_p=1e-3),
]


def logits(step: int, count: int) -> torch.Tensor:
    return torch.randn(count, VOCAB, generator=torch.Generator().manual_seed(step)) * 3


def filled() -> Sampler:
    sampler = Sampler(max_rows=ROWS, vocab_size=VOCAB, device="cpu")
    for row, kind in enumerate(KINDS):
        sampler.add(row, kind, [1, 2, 3], 2, 50 + row, row)
    return sampler


class Buffers:
    def __init__(self) -> None:
        self.tokens = torch.full((ROWS, LONGEST), -7, dtype=torch.int32)
        self.lengths = torch.arange(ROWS)
        self.out = torch.full((2, 6), 77)

    def draw(self, sampler: Sampler, x: torch.Tensor, rows: list[int]) -> tuple[list[int], list[int]]:
        """Draw inside for these rows, -1 for none; returns what was left for every line."""
        draws = sampler.step_draws()
        draws.prepare()
        self.out.fill_(77)
        out = self.out[:, : len(rows)]
        draws.run(x, torch.tensor(rows), self.tokens, self.lengths, out)
        sampler.note_draws_elsewhere()
        return out[0].tolist(), out[1].tolist()


def test_inside_and_outside_take_turns() -> None:
    """Four steps outside make noise for steps to come, which a row that drew inside has passed."""
    rows = list(range(len(KINDS)))
    outside, both, buffers = filled(), filled(), Buffers()
    seen: list[list[int]] = []
    for step in range(12):
        expected = outside.sample(logits(step, len(rows)), rows)
        if step in (3, 4, 6, 9):
            tokens, statuses = buffers.draw(both, logits(step, len(rows)), rows)
        else:
            output = both.sample(logits(step, len(rows)), rows)
            tokens, statuses = output.tokens(), output.statuses()
        assert (tokens, statuses) == (expected.tokens(), expected.statuses())
        seen.append(tokens)
    assert len({tokens[0] for tokens in seen}) > 8
    assert buffers.lengths.tolist() == [row + 4 * (row < len(KINDS)) for row in range(ROWS)]
    inside = [seen[step] for step in (3, 4, 6, 9)]
    for row in rows:
        assert buffers.tokens[row].tolist() == [-7] * row + [s[row] for s in inside] + [-7] * (12 - row)


def test_lines_of_nobody_and_bad_rows() -> None:
    x = logits(0, 6)
    expected = filled().sample(x[[1, 4]], [3, 0]).tokens()
    x[0] = torch.nan
    x[2, 5], x[3] = torch.inf, -torch.inf
    buffers, sampler = Buffers(), filled()
    tokens, statuses = buffers.draw(sampler, x, [-1, 3, 1, 2, 0, -1])
    assert tokens == [77, expected[0], 0, 0, expected[1], 77]
    assert statuses == [77, 0, 1, 2, 0, 77]
    assert buffers.lengths.tolist() == [1, 2, 3, 4, 4, 5, 6, 7]
    # Nobody at all.
    assert buffers.draw(sampler, x, [-1] * 6) == ([77] * 6, [77] * 6)


def test_what_is_drawn_inside() -> None:
    bare = RowSampling(temperature=0.5, top_p=0.5, min_p=0.1)
    sampler = Sampler(max_rows=ROWS, vocab_size=VOCAB, device="cpu")
    fields = [
        {"top_k": 3},
        {"repetition_penalty": 1.1},
        {"logprobs": 0},
        {"logit_bias": ((3, 1.0),)},
        {"bad_ids": (4,)},
        {"min_tokens": 1, "stop_ids": (2,)},
    ]
    sampler.add(6, bare, [1], 1, 0, 0)
    for row, extra in enumerate(fields):
        sampled = RowSampling(temperature=0.5, **extra)  # type: ignore[arg-type]
        sampler.add(row, sampled, [1], 1, 0, 0)
    assert [row for row in range(7) if sampler.is_plain_draw(row)] == [6]
    version = sampler.version
    # Once it has its least number of tokens, a row may go inside.
    sampler.sample(logits(0, 1), [5])
    assert sampler.is_plain_draw(5) and sampler.version != version
    assert not any(sampler.is_plain_greedy(row) for row in range(7))
