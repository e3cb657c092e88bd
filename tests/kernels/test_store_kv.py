"""Are exactly the named slots written, into one layer of shared pages, in the pages' type?"""

from __future__ import annotations

import pytest
import torch

from slipstream.kernels.store_kv import store_kv


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_only_the_named_slots_change(dtype: torch.dtype) -> None:
    pool = torch.full((6, 3, 2, 4, 2, 8), 9.0, dtype=dtype)
    k, v = torch.randn(2, 5, 2, 8, generator=torch.Generator().manual_seed(0)).unbind(0)
    slots = [(5, 3), (0, 0), (5, 2), (1, 1), (3, 0)]
    page, offset = torch.tensor(slots).unbind(1)
    store_kv(k, v, pool[:, 1], page, offset)
    expected = torch.full_like(pool, 9.0)
    for i, (p, o) in enumerate(slots):
        expected[p, 1, 0, o], expected[p, 1, 1, o] = k[i].to(dtype), v[i].to(dtype)
    assert torch.equal(pool, expected)


def test_strided_keys_are_accepted() -> None:
    fused = torch.randn(3, 6, 8, generator=torch.Generator().manual_seed(0))
    pool = torch.zeros(2, 2, 4, 2, 8)
    store_kv(fused[:, 2:4], fused[:, 4:6], pool, torch.tensor([0, 1, 1]), torch.tensor([3, 0, 1]))
    assert torch.equal(pool[1, 1, 0], fused[1, 4:6])
