"""Do the kernels of a step draw what the sampler's definition draws, and leave lines of nobody alone?"""

from __future__ import annotations

import pytest
import torch

from slipstream.core.sampling_params import RowSampling
from slipstream.sampling import step_draws
from slipstream.sampling.sampler import Sampler
from tests.kernels.gpu.conftest import HAS_GPU, has_interpreter
from tests.kernels.gpu.plain_libdevice import replace_libdevice

if HAS_GPU or has_interpreter():
    from slipstream.kernels.gpu import nucleus


# The interpreter's numpy speaks of NaN, infinities and overflow that a GPU computes with in silence.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")

ROWS, LONGEST, STEPS = 8, 12, 2
KINDS = [
    RowSampling(temperature=1.0),
    RowSampling(temperature=0.8, top_p=0.9),
    RowSampling(temperature=1.3, min_p=0.05),
    RowSampling(temperature=0.9, top_p=0.95, min_p=0.1),
    RowSampling(temperature=0.7, top_p=0.5),
]
# -1 is nobody.
LINES = [3, -1, 0, 4, -1, 2, 1, -1]


def run(device: str, vocab: int, *, by_kernels: bool) -> list[list[list[int]]]:
    sampler = Sampler(max_rows=ROWS, vocab_size=vocab, device=device)
    for row, kind in enumerate(KINDS):
        sampler.add(row, kind, [1, 2, 3], 2, 50 + row, row)
    draws = sampler.step_draws()
    draws.prepare()
    tokens = torch.zeros(ROWS, LONGEST, dtype=torch.int32, device=device)
    lengths = torch.arange(ROWS, device=device)
    out = torch.full((2, len(LINES)), 77, device=device)
    rows = torch.tensor(LINES, device=device)
    found: list[list[list[int]]] = []
    for step in range(STEPS):
        x = torch.randn(len(LINES), vocab, generator=torch.Generator().manual_seed(step)) * 3
        x[1] = torch.nan
        if step:
            x[3, 5], x[5] = torch.nan, -torch.inf
        draw = draws.run if by_kernels else draws.run_by_tensors
        draw(x.to(device), rows, tokens, lengths, out)
        found += [out.tolist(), tokens.tolist(), [lengths.tolist()]]
    return found


@pytest.mark.parametrize("vocab", [700, 9001])
def test_a_step_draws_what_the_definition_draws(
    device: str, vocab: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run("cpu", vocab, by_kernels=False)
    if not HAS_GPU:
        monkeypatch.setattr(step_draws, "runs_kernels", lambda x: True)
        replace_libdevice(monkeypatch, nucleus)
    given = run(device, vocab, by_kernels=True)
    assert given == expected
    ids, statuses = given[-3]
    assert statuses == [0, 77, 0, 1, 77, 2, 0, 77] and ids[1] == 77
    assert given[-1] == [[2, 3, 4, 5, 6, 5, 6, 7]]


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs one GPU")
def test_inside_has_the_bits_of_outside() -> None:
    """At a real vocabulary, over many rows: the same kernels draw for a batch of rows."""
    vocab, count = 128256, 64
    generator = torch.Generator().manual_seed(3)
    samplers = [Sampler(max_rows=count, vocab_size=vocab, device="cuda") for _ in range(2)]
    for sampler in samplers:
        for row in range(count):
            kind = KINDS[row % len(KINDS)]
            sampler.add(row, kind, [1, 2], 1, 900 + row, 0)
    draws = samplers[0].step_draws()
    tokens = torch.zeros(count, LONGEST, dtype=torch.int32, device="cuda")
    lengths = torch.zeros(count, dtype=torch.int64, device="cuda")
    out = torch.zeros(2, count, dtype=torch.int64, device="cuda")
    rows = list(range(count))
    draws.prepare()
    for _ in range(4):
        x = (torch.randn(count, vocab, generator=generator) * 4).bfloat16().float().cuda()
        draws.run(x, torch.arange(count, device="cuda"), tokens, lengths, out)
        output = samplers[1].sample(x, rows)
        assert out.tolist() == [output.tokens(), output.statuses()]
    assert lengths.tolist() == [4] * count
