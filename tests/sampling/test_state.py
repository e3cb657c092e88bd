"""The device's table holds what was written at admission and counts outputs itself."""

import torch

from slipstream.core.sampling_params import RowSampling
from slipstream.sampling import state
from slipstream.sampling.state import RowTable

CPU = torch.device("cpu")


def test_a_row_is_written_whole_and_alone():
    table = RowTable(max_rows=3, device=CPU)
    sampling = RowSampling(temperature=0.7, top_p=0.9, min_p=0.1, top_k=5, min_tokens=4, presence_penalty=2.0)
    table.write(1, sampling, seed=2**64 - 2, sample_idx=6, position=3, slot=2)
    assert table.floats[1].tolist() == [0.7, 0.9, 0.1, 1.0, 2.0, 0.0]
    assert table.ints[1].tolist() == [2**32 - 2, 2**32 - 1, 6, 5, 4, 2, -1]
    assert table.position.tolist() == [0, 3, 0]
    assert not table.floats[[0, 2]].any() and not table.ints[[0, 2]].any()


def test_a_row_is_early_until_it_has_generated_its_minimum():
    table = RowTable(max_rows=2, device=CPU)
    for row, minimum in enumerate((2, 0)):
        table.write(
            row, RowSampling(min_tokens=minimum), seed=0, sample_idx=0, position=0, slot=state.NO_SLOT
        )
    rows = torch.tensor([1, 0])
    seen = []
    for _ in range(4):
        seen.append(table.is_early(rows).tolist())
        table.advance(rows, torch.ones_like(rows))
    assert seen == [[False, True], [False, True], [False, False], [False, False]]


def test_a_row_written_twice_before_it_is_read_is_the_last():
    table = RowTable(max_rows=2, device=CPU)
    for top_k in (3, 4):
        table.write(1, RowSampling(top_k=top_k), seed=top_k, sample_idx=0, position=top_k, slot=state.NO_SLOT)
    table.advance(torch.tensor([1]), torch.ones(1, dtype=torch.int64))
    assert table.ints[1, state.TOP_K] == 4 and table.position.tolist() == [0, 5]
    table.write(0, RowSampling(min_p=0.5), seed=0, sample_idx=0, position=0, slot=state.NO_SLOT)
    assert table.floats[0, state.MIN_P] == 0.5 and table.position.tolist() == [0, 5]
