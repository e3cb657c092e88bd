"""Does what a plan changes arrive in the rows, and nothing else, however much of it there is?"""

from __future__ import annotations

import random

import pytest
import torch

from slipstream.core.plan import RequestInit, StepPlan
from slipstream.core.sampling_params import RowSampling
from slipstream.engine.rows import FEW, Rows

NUM_ROWS, MAX_SEQ_LEN, BLOCK_TOKENS, NUM_GROUPS = 5, 701, 8, 2


def init_of(rng: random.Random, row: int, length: int) -> RequestInit:
    num_blocks = -(-length // BLOCK_TOKENS)
    return RequestInit(
        row=row,
        request_id=str(row),
        tokens=[rng.randrange(2**31) for _ in range(length)],
        num_prompt=length,
        num_computed=0,
        blocks=[[rng.randrange(2**31) for _ in range(num_blocks)] for _ in range(NUM_GROUPS)],
        sampling=RowSampling(),
        seed=0,
        sample_idx=0,
    )


@pytest.mark.parametrize("longest", [6, 700])
def test_rows_hold_what_plans_wrote(longest: int) -> None:
    rng = random.Random(longest)
    rows = Rows(
        max_rows=NUM_ROWS,
        max_seq_len=MAX_SEQ_LEN,
        num_groups=NUM_GROUPS,
        block_tokens=BLOCK_TOKENS,
        device=torch.device("cpu"),
    )
    tokens, lengths, table = rows.tokens.clone(), rows.lengths.clone(), rows.block_table.clone()
    assert not tokens.any() and not lengths.any() and not table.any()
    most = 0
    for step in range(12):
        plan = StepPlan(step)
        plan.added = [init_of(rng, row, rng.randint(1, longest)) for row in range(NUM_ROWS) if step % 3 == 0]
        for init in plan.added:
            tokens[init.row, : len(init.tokens)] = torch.tensor(init.tokens)
            lengths[init.row] = len(init.tokens)
            for group, blocks in enumerate(init.blocks):
                table[group, init.row, : len(blocks)] = torch.tensor(blocks)
        row, group = rng.randrange(NUM_ROWS), rng.randrange(NUM_GROUPS)
        held = len(rows.pages_of(row)[group])
        if step % 3 == 1:
            plan.new_blocks = {group: [(row, [7, 8])]}
            table[group, row, held : held + 2] = torch.tensor([7, 8])
        if step % 3 == 2:
            # Of a row that the same plan may have added: what it names comes later.
            plan.tokens = [(row, 1, [3, 4, 5])]
            tokens[row, 1:4] = torch.tensor([3, 4, 5])
            lengths[row] = 4
        rows.apply(plan)
        most = max(most, sum(len(init.tokens) for init in plan.added))
        assert torch.equal(rows.tokens, tokens) and torch.equal(rows.block_table, table)
        assert torch.equal(rows.lengths, lengths) and rows.lengths.dtype == torch.int64
    assert (most > FEW) == (longest > 6)


def test_each_table_begins_where_kernels_expect_it() -> None:
    rows = Rows(max_rows=3, max_seq_len=10, num_groups=1, block_tokens=8, device=torch.device("cpu"))
    first = rows.lengths.data_ptr()
    assert (rows.tokens.data_ptr() - first) % 256 == 0 == (rows.block_table.data_ptr() - first) % 256
    assert rows.tokens.is_contiguous() and rows.block_table.is_contiguous() and rows.lengths.is_contiguous()
