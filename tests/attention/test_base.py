"""Does a plan check its bounds and count its rows?"""

from __future__ import annotations

import pytest

from slipstream.attention.base import AttentionPlan
from slipstream.attention.torch_reference import TorchReference
from slipstream.core.errors import EngineError


@pytest.mark.parametrize(
    ("query_lens", "num_decodes"), [([], 0), ([1], 1), ([1, 1, 4], 2), ([3, 5], 0), ([1, 1], 2)]
)
def test_leading_rows_of_one_token_are_counted(query_lens: list[int], num_decodes: int) -> None:
    plan = TorchReference().plan(query_lens=query_lens, max_seq_lens=[n + 10 for n in query_lens])
    assert plan.num_decodes == num_decodes
    assert plan.max_seq_len == max((n + 10 for n in query_lens), default=0)
    assert plan.step_cache == {}


@pytest.mark.parametrize(
    ("query_lens", "max_seq_lens", "match"),
    [([1], [], "1 query lengths for 0"), ([4], [3], "Row 0 runs 4"), ([1, 0], [3, 3], "Row 1 runs 0")],
)
def test_bounds_that_do_not_fit_raise(query_lens: list[int], max_seq_lens: list[int], match: str) -> None:
    with pytest.raises(EngineError, match=match):
        AttentionPlan.create(TorchReference(), query_lens, max_seq_lens)
