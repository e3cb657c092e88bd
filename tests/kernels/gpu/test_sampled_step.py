"""Does a step of the sampler by kernels draw what a step by tensor operations draws?

Where there is no GPU the kernels are interpreted over a CPU's tensors: their way through the sampler runs.
"""

from __future__ import annotations

import pytest
import torch

from slipstream.core.plan import TokenLogprobs
from slipstream.core.sampling_params import RowSampling
from slipstream.sampling import batch, candidates, filters, logprobs
from slipstream.sampling import sampler as sampler_file
from slipstream.sampling.sampler import Sampler
from tests.kernels.gpu.conftest import HAS_GPU, has_interpreter
from tests.kernels.gpu.plain_libdevice import replace_libdevice

if HAS_GPU or has_interpreter():
    from slipstream.kernels.gpu import nucleus, row_logprobs


# The interpreter's numpy speaks of NaN and infinities that a GPU computes with in silence.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")

Result = tuple[list[int], list[int], dict[int, TokenLogprobs]]
VOCAB, STEPS = 1300, 2
HOT = RowSampling(temperature=0.8, top_p=0.9)
# Draws of these seeds are far from every boundary, which the devices' exponentials move by 1e-7 of the mass.
WORK = {
    "sampled": [HOT] * 3,
    "from all, masks": [
        RowSampling(temperature=0.9, min_p=0.02),
        RowSampling(temperature=1.3, bad_ids=(3, 700), logprobs=2),
        RowSampling(temperature=0.7, min_tokens=2, stop_ids=(5, 6)),
    ],
    "penalties and logprobs": [
        RowSampling(temperature=0.8, top_p=0.95, repetition_penalty=1.3, logprobs=5),
        RowSampling(temperature=1.5, top_p=0.5, frequency_penalty=0.5, logprobs=2),
        RowSampling(temperature=0.3, top_p=0.9, min_p=0.1, logit_bias=((7, 3.0), (8, -2.0)), logprobs=0),
    ],
    "logprobs of some, masks": [
        RowSampling(temperature=0.9, top_k=20, top_p=0.9),
        RowSampling(logprobs=3, bad_ids=(3, 4)),
        RowSampling(temperature=1.0, top_p=0.8, min_tokens=2, stop_ids=(5, 6), logprobs=1),
    ],
    "greedy with logprobs": [RowSampling(logprobs=4), RowSampling(logprobs=2), RowSampling(logprobs=1)],
}


def run(sampled: list[RowSampling], device: str, *, by_kernels: bool) -> list[Result]:
    sampler = Sampler(max_rows=8, vocab_size=VOCAB, device=device)
    sampler._tables._has_kernels = by_kernels
    for row, sampling in enumerate(sampled):
        sampler.add(row, sampling, [1, 2, 3, 2, 900], 3, 50 + row, 0)
    found: list[Result] = []
    for step in range(STEPS):
        x = torch.randn(len(sampled), VOCAB, generator=torch.Generator().manual_seed(step)) * 3
        if step == 1:
            x[1, 700] = torch.nan
        output = sampler.sample(x.to(device), list(range(len(sampled))))
        found.append((output.tokens(), output.statuses(), output.logprobs_by_row()))
    return found


@pytest.mark.parametrize("kind", WORK)
def test_steps_are_those_of_tensors(kind: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = run(WORK[kind], "cpu", by_kernels=False)
    if not HAS_GPU:
        for file in (batch, candidates, filters, logprobs, sampler_file):
            monkeypatch.setattr(file, "runs_kernels", lambda x: True)
        replace_libdevice(monkeypatch, nucleus, row_logprobs)
    given = run(WORK[kind], device, by_kernels=True)
    for (tokens, statuses, entries), (tokens_given, statuses_given, entries_given) in zip(
        expected, given, strict=True
    ):
        assert (tokens_given, statuses_given) == (tokens, statuses)
        assert entries_given.keys() == entries.keys()
        for row, one in entries.items():
            other = entries_given[row]
            assert (other.token_id, other.rank) == (one.token_id, one.rank)
            assert [token for token, _ in other.top] == [token for token, _ in one.top]
            # Sums of some thousand float32 exponentials.
            assert [other.logprob, *(v for _, v in other.top)] == pytest.approx(
                [one.logprob, *(v for _, v in one.top)], abs=1e-6
            )
    assert any(statuses[1] for _, statuses, _ in expected), "a row with NaN is refused"
