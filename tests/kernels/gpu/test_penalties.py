"""Do the penalty kernels change and count what the tables' own definition does, bit by bit?"""

from __future__ import annotations

import pytest
import torch

from slipstream.sampling.penalties import PenaltyTables
from tests.kernels.gpu.conftest import HAS_GPU, has_interpreter

if HAS_GPU or has_interpreter():
    from slipstream.kernels.gpu import penalties as kernels

VOCAB, ROWS = 1031, 5


def tables_of(device: str) -> tuple[PenaltyTables, torch.Tensor]:
    """Return tables that have seen prompts and outputs with repeats, a list longer than a kernel's block."""
    tables = PenaltyTables(max_rows=8, vocab_size=VOCAB, device=torch.device(device))
    generator = torch.Generator().manual_seed(4)
    slots = []
    for length in (1, 40, 700, 9, 300):
        tokens = torch.randint(0, VOCAB, (length,), generator=generator).tolist()
        slots.append(tables.claim(tokens, max(1, length // 2)))
    tables._flush()
    # A column of a wider tensor, as the sampler has it.
    return tables, torch.tensor([[slot, -1] for slot in slots], device=device)[:, 0]


@pytest.mark.parametrize("steps", [0, 3])
def test_penalties_are_the_definition(device: str, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "BLOCK", 256)
    tables, slots = tables_of(device)
    generator = torch.Generator().manual_seed(7)
    x = (torch.randn(ROWS + 1, VOCAB, generator=generator) * 4).to(device)
    index = torch.tensor([4, 0, 5, 2, 3], device=device)
    asked = torch.rand(ROWS, 3, generator=generator).add(0.5).to(device)
    repetition, presence, frequency = asked.unbind(1)
    of_kernels = (tables._counts_SV.clone(), tables._seen_SW.clone(), tables._length_S.clone())
    for step in range(steps):
        drawn = torch.randint(0, VOCAB, (ROWS + 1,), generator=generator).to(device)
        # A token that was seen before, the same in every row.
        drawn[index[:2]] = 7 + step // 2
        kernels.count(drawn, index, slots, of_kernels)
        tables._steps += 1
        tables.count_by_tensors(slots, drawn.index_select(0, index))
    assert torch.equal(of_kernels[0], tables._counts_SV)
    assert torch.equal(of_kernels[2], tables._length_S)
    expected, given = x.clone(), x.clone()
    tables.penalise_by_tensors(expected, index, slots, repetition, presence, frequency)
    saved = kernels.penalise(
        given, index, slots, of_kernels, (repetition, presence, frequency), longest=tables.longest()
    )
    assert torch.equal(given, expected) and not torch.equal(given, x)
    kernels.restore(given, index, slots, of_kernels[1], of_kernels[2], saved)
    assert torch.equal(given, x)
