"""Do rows in host memory describe a step as rows on any device do?"""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest
import torch

from slipstream.core.plan import RequestInit, Span, StepPlan
from slipstream.core.sampling_params import RowSampling
from slipstream.engine.host_rows import HostRows
from slipstream.engine.rows import Rows

MAX_ROWS, BLOCK_TOKENS, NUM_GROUPS = 7, 4, 3


def plan_of(rng: random.Random) -> StepPlan:
    """Fill every row with a sequence of its own length and pages."""
    plan = StepPlan(0)
    for row in range(MAX_ROWS):
        length = rng.randint(1, 40)
        num_blocks = -(-(length + 20) // BLOCK_TOKENS)
        plan.added.append(
            RequestInit(
                row=row,
                request_id=str(row),
                tokens=[rng.randrange(1000) for _ in range(length)],
                num_prompt=length,
                num_computed=0,
                blocks=[[rng.randrange(500) for _ in range(num_blocks)] for _ in range(NUM_GROUPS)],
                sampling=RowSampling(),
                seed=0,
                sample_idx=0,
            )
        )
    return plan


def random_spans(rng: random.Random, chosen: list[int], lengths: list[int]) -> list[Span]:
    """Return decodes, then chunks. A decode's start is an upper bound: the row's length decides."""
    decodes, chunks = [], []
    for row in chosen:
        if lengths[row] == 1 or rng.random() < 0.6:
            decodes.append(Span(row, lengths[row] - 1 + rng.randint(0, 2), 1))
        else:
            start = rng.randrange(lengths[row] - 1)
            chunks.append(Span(row, start, lengths[row] - start))
    return decodes + chunks


def assert_equal(given: Any, expected: Any, name: str) -> None:
    if isinstance(expected, torch.Tensor):
        assert given.dtype == expected.dtype and torch.equal(given, expected), name
    else:
        assert given == expected, name


@pytest.mark.parametrize("seed", range(20))
def test_steps_and_appended_tokens_are_the_same(seed: int) -> None:
    rng = random.Random(seed)
    sizes = {
        "max_rows": MAX_ROWS,
        "max_seq_len": 64,
        "num_groups": NUM_GROUPS,
        "block_tokens": BLOCK_TOKENS,
        "device": torch.device("cpu"),
    }
    plain, host = Rows(**sizes), HostRows(**sizes)
    plan = plan_of(rng)
    for rows in (plain, host):
        rows.apply(plan)
    for _ in range(4):
        chosen = rng.sample(range(MAX_ROWS), rng.randint(1, MAX_ROWS))
        lengths = plain.lengths.tolist()
        spans = random_spans(rng, chosen, lengths)
        expected, given = plain.inputs(spans), host.inputs(spans)
        for field in dataclasses.fields(expected):
            assert_equal(getattr(given, field.name), getattr(expected, field.name), field.name)
        rows_R = given.rows_B
        ids = torch.tensor([rng.randrange(1000) for _ in spans])
        for rows in (plain, host):
            rows.append(rows_R, ids)
        assert torch.equal(plain.tokens, host.tokens) and torch.equal(plain.lengths, host.lengths)
