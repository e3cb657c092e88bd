"""Do rows draw inside a step what the sampler draws for them outside, in whatever order they do either?

Where there is no GPU the definition draws; `tests/kernels/gpu/test_draw_append.py` holds the kernels to it.
"""

from __future__ import annotations

import torch

from slipstream.core.sampling_params import RowSampling
from slipstream.sampling.base import unpack_wide_logprobs
from slipstream.sampling.sampler import Sampler
from slipstream.sampling.step_draws import WIDTH

VOCAB, ROWS, LONGEST = 700, 8, 16
KINDS = [
    RowSampling(temperature=1.0),
    RowSampling(temperature=0.8, top_p=0.9),
    RowSampling(temperature=1.3, min_p=0.05),
    RowSampling(temperature=0.9, top_p=0.95, min_p=0.1),
    RowSampling(temperature=1e-3, top_p=1e-3),
    RowSampling(temperature=1.2, top_p=0.95, repetition_penalty=1.3, frequency_penalty=0.4, logprobs=5),
    RowSampling(repetition_penalty=3.0, presence_penalty=1.5, logprobs=0),
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
        self.out = torch.full((2, 7), 77)
        self.logprobs = torch.zeros(7, WIDTH, dtype=torch.float64)

    def draw(self, sampler: Sampler, x: torch.Tensor, rows: list[int]) -> tuple[list[int], list[int]]:
        """Choose inside for these rows, -1 for none; returns what was left for every line."""
        draws = sampler.step_draws()
        draws.prepare()
        self.out.fill_(77)
        out = self.out[:, : len(rows)]
        greedy = [row if row >= 0 and sampler.is_greedy(row) else -1 for row in rows]
        drawn = [row if row != other else -1 for row, other in zip(rows, greedy, strict=True)]
        rows_2R = torch.tensor([greedy, drawn])
        self.logprobs.fill_(-77.0)
        draws.run(x, rows_2R, self.tokens, self.lengths, out, self.logprobs[: len(rows)])
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
            found = list(output.logprobs_by_row().values())
        assert (tokens, statuses) == (expected.tokens(), expected.statuses())
        if step in (3, 4, 6, 9):
            found = unpack_wide_logprobs(buffers.logprobs[[5, 6]].numpy(), [5, 0])
        assert found == list(expected.logprobs_by_row().values())
        seen.append(tokens)
    assert len({tokens[0] for tokens in seen}) > 8
    assert buffers.lengths.tolist() == [row + 4 * (row < len(KINDS)) for row in range(ROWS)]
    inside = [seen[step] for step in (3, 4, 6, 9)]
    for row in rows:
        assert buffers.tokens[row].tolist() == [-7] * row + [s[row] for s in inside] + [-7] * (12 - row)


def test_lines_of_nobody_and_bad_rows() -> None:
    x = logits(0, 7)
    expected = filled().sample(x[[1, 4, 6]], [3, 0, 6]).tokens()
    x[0] = torch.nan
    x[2, 5], x[3] = torch.inf, -torch.inf
    buffers, sampler = Buffers(), filled()
    tokens, statuses = buffers.draw(sampler, x, [-1, 3, 1, 2, 0, -1, 6])
    assert tokens == [0, expected[0], 0, 0, expected[1], 0, expected[2]]
    assert statuses == [0, 0, 1, 2, 0, 0, 0]
    assert buffers.lengths.tolist() == [1, 2, 3, 4, 4, 5, 7, 7]
    # Nobody at all.
    assert buffers.draw(sampler, x, [-1] * 7) == ([0] * 7, [0] * 7)
    assert buffers.logprobs.eq(-77.0).all()


def test_what_is_served_inside() -> None:
    sampler = Sampler(max_rows=ROWS, vocab_size=VOCAB, device="cpu")
    refused = [
        {"top_k": 3},
        {"logprobs": 21},
        {"logit_bias": ((3, 1.0),)},
        {"bad_ids": (4,)},
        {"min_tokens": 1, "stop_ids": (2,)},
    ]
    for row, extra in enumerate(refused):
        sampled = RowSampling(temperature=0.5, **extra)  # type: ignore[arg-type]
        sampler.add(row, sampled, [1], 1, 0, 0)
    sampler.add(5, RowSampling(temperature=0.5, repetition_penalty=1.1, logprobs=20), [1], 1, 0, 0)
    sampler.add(6, RowSampling(logprobs=1, top_k=3), [1], 1, 0, 0)
    assert [row for row in range(7) if sampler.fits_a_step(row)] == [5, 6]
    version = sampler.version
    # Once it has its least number of tokens, a row may go inside.
    sampler.sample(logits(0, 1), [4])
    assert sampler.fits_a_step(4) and sampler.version != version
    assert not any(sampler.is_plain_greedy(row) for row in range(7))
    assert [sampler.num_top(row) for row in (4, 5)] == [-1, 20] and sampler.is_greedy(6)
