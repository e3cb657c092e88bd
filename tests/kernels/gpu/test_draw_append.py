"""Do the kernels of a step choose what the sampler's definition chooses, and leave lines of nobody alone?

Rows that take their greatest logit and rows that draw, with penalties and logprobs and without.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from slipstream.core.plan import TokenLogprobs
from slipstream.core.sampling_params import RowSampling
from slipstream.sampling import step_draws
from slipstream.sampling.base import unpack_wide_logprobs
from slipstream.sampling.sampler import Sampler
from slipstream.sampling.step_draws import WIDTH
from tests.kernels.gpu.conftest import HAS_GPU, has_interpreter
from tests.kernels.gpu.plain_libdevice import replace_libdevice

if HAS_GPU or has_interpreter():
    from slipstream.kernels.gpu import draw_append, greedy_append, nucleus, row_logprobs


# The interpreter's numpy speaks of NaN, infinities and overflow that a GPU computes with in silence.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")

LONGEST, STEPS = 12, 2
KINDS = [
    RowSampling(temperature=1.0),
    RowSampling(temperature=0.8, top_p=0.9),
    RowSampling(temperature=1.3, min_p=0.05),
    RowSampling(temperature=0.9, top_p=0.95, min_p=0.1),
    RowSampling(temperature=0.7, top_p=0.5),
    RowSampling(temperature=0.8, top_p=0.95, repetition_penalty=1.3, logprobs=5),
    RowSampling(presence_penalty=2.0, frequency_penalty=0.5, logprobs=0),
    RowSampling(logprobs=20),
    RowSampling(temperature=1.1, repetition_penalty=2.0),
    RowSampling(),
]
# -1 is nobody.
LINES = [3, -1, 0, 4, -1, 2, 1, -1, 5, 6, 7, 8, 9]


class Step:
    """The tables and buffers of a step whose lines are these rows."""

    def __init__(self, lines: list[int], vocab: int, device: str, *, by_kernels: bool) -> None:
        self.lines, self.by_kernels = lines, by_kernels
        self.sampler = Sampler(max_rows=max(lines) + 1, vocab_size=vocab, device=device)
        self.sampler._tables._has_kernels = by_kernels
        for row in range(max(lines) + 1):
            self.sampler.add(row, KINDS[row % len(KINDS)], [1, 2, 3, 2, 600], 3, 50 + row, row)
        self.draws = self.sampler.step_draws()
        self.tokens = torch.zeros(max(lines) + 1, LONGEST, dtype=torch.int32, device=device)
        self.lengths = torch.arange(max(lines) + 1, device=device) % 4
        self.out = torch.full((2, len(lines)), 77, device=device)
        self.logprobs = torch.zeros(len(lines), WIDTH, dtype=torch.float64, device=device)
        leads = [row if row >= 0 and self.sampler.is_greedy(row) else -1 for row in lines]
        drawn = [row if row != lead else -1 for row, lead in zip(lines, leads, strict=True)]
        self.rows = torch.tensor([leads, drawn], device=device)

    def run(self, x: torch.Tensor) -> None:
        self.draws.prepare()
        run = self.draws.run if self.by_kernels else self.draws.run_by_tensors
        run(x, self.rows, self.tokens, self.lengths, self.out, self.logprobs)

    def found(self) -> tuple[list[Any], list[TokenLogprobs | None]]:
        """Return the numbers that must be equal, and logprobs."""
        tables = self.sampler._tables
        wanting = [i for i, row in enumerate(self.lines) if row >= 0 and self.sampler.num_top(row) >= 0]
        counts = [self.sampler.num_top(self.lines[i]) for i in wanting]
        entries = unpack_wide_logprobs(self.logprobs.cpu().numpy()[wanting], counts)
        slots, width = tables.num_slots, int(tables._length_S.max())
        numbers = (self.out, self.tokens, self.lengths, tables._counts_SV[:slots].sum(1), tables._length_S)
        return [*(part.tolist() for part in numbers), tables._seen_SW[:, :width].tolist()], entries


def assert_close(
    given: list[TokenLogprobs | None], expected: list[TokenLogprobs | None], *, atol: float
) -> None:
    for one, other in zip(given, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            assert (one.token_id, one.rank) == (other.token_id, other.rank)
            assert [token for token, _ in one.top] == [token for token, _ in other.top]
            values = [other.logprob, *(value for _, value in other.top)]
            assert [one.logprob, *(value for _, value in one.top)] == pytest.approx(values, abs=atol)


@pytest.mark.parametrize("vocab", [700, 9001])
def test_a_step_chooses_what_the_definition_chooses(
    device: str, vocab: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = Step(LINES, vocab, "cpu", by_kernels=False)
    given = Step(LINES, vocab, device, by_kernels=True)
    for step in range(STEPS):
        x = torch.randn(len(LINES), vocab, generator=torch.Generator().manual_seed(step)) * 3
        x[1] = torch.nan
        if step == 1:
            x[3, 5], x[5], x[8, 9] = torch.nan, -torch.inf, torch.nan
        raw = x.clone()
        expected.run(x.clone())
        with monkeypatch.context() as patch:
            if not HAS_GPU:
                patch.setattr(step_draws, "runs_kernels", lambda x: True)
                patch.setattr(step_draws, "greedy_append_op", greedy_append.greedy_append)
                replace_libdevice(patch, nucleus, row_logprobs)
            on_device = x.to(device)
            given.run(on_device)
        numbers, entries = given.found()
        numbers_expected, entries_expected = expected.found()
        assert numbers == numbers_expected
        # Sums of some thousand float32 exponentials.
        assert_close(entries, entries_expected, atol=1e-6)
        nobody = [i for i, row in enumerate(LINES) if row < 0]
        torch.testing.assert_close(on_device.cpu()[nobody], raw[nobody], rtol=0, atol=0, equal_nan=True)
        if step == 1:
            assert numbers[0][1] == [0, 0, 0, 1, 0, 2, 0, 0, 1, 0, 0, 0, 0] and entries[0] is None
    assert numbers[2] == [(row % 4) + STEPS for row in range(len(KINDS))]


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs one GPU")
def test_inside_has_the_bits_of_outside() -> None:
    """At a real vocabulary, over many rows: the same kernels choose for a batch of rows."""
    assert draw_append.CAPACITY == nucleus.CAPACITY
    vocab, rows = 128256, list(range(60))
    inside, outside = (Step(rows, vocab, "cuda", by_kernels=True) for _ in range(2))
    generator = torch.Generator().manual_seed(3)
    for _ in range(4):
        x = (torch.randn(len(rows), vocab, generator=generator) * 4).bfloat16().float().cuda()
        inside.run(x.clone())
        output = outside.sampler.sample(x, rows)
        assert inside.out.tolist() == [output.tokens(), output.statuses()]
        assert_close(inside.found()[1], list(output.logprobs_by_row().values()), atol=1e-9)
    tables, others = inside.sampler._tables, outside.sampler._tables
    assert torch.equal(tables._counts_SV, others._counts_SV)


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs one GPU")
def test_a_captured_step_follows_tables_that_move() -> None:
    """Lists of seen tokens outgrow their tables between replays: the captured kernels find them again."""
    vocab, rows = 32000, [5, 6, 8]
    plain, replayed = (Step(rows, vocab, "cuda", by_kernels=True) for _ in range(2))
    x = torch.empty(len(rows), vocab, device="cuda")
    for step in (plain, replayed):
        step.tokens = torch.zeros(9, 400, dtype=torch.int32, device="cuda")
        step.draws.prepare()
    nobody, rows_2R = torch.full_like(replayed.rows, -1), replayed.rows.clone()
    replayed.rows.copy_(nobody)
    x.zero_()
    graph = torch.cuda.CUDAGraph()
    places = (replayed.rows, replayed.tokens, replayed.lengths, replayed.out, replayed.logprobs)
    replayed.draws.run(x, *places)
    with torch.cuda.graph(graph):
        replayed.draws.run(x, *places)
    replayed.rows.copy_(rows_2R)
    first = replayed.sampler._tables._seen_SW.data_ptr()
    generator = torch.Generator().manual_seed(5)
    for _ in range(300):
        logits = (torch.randn(len(rows), vocab, generator=generator) * 4).cuda()
        x.copy_(logits)
        replayed.draws.prepare()
        graph.replay()
        plain.run(logits)
        assert torch.equal(plain.out, replayed.out)
    assert replayed.sampler._tables._seen_SW.data_ptr() != first
    assert plain.found()[0] == replayed.found()[0]
