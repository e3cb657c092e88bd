"""What does a step of rows look like, some of which begin with the same pages?

Invariant: of what a row shares only the first row of its group names the pages; the others' entries there
name page 0, all of it NaN. `whole` is the table that names all pages.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from slipstream.kernels.shared_prefix import PrefixLayout, SharedGroup, SharedPrefixes
from tests.kernels.gpu.ragged_pages import draw_pages

PAGE = 16


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SharedStep:
    q_RNH: Tensor
    pages: Tensor
    table_RC: Tensor
    whole_RC: Tensor
    lens_R: Tensor
    shared: SharedPrefixes


def make_step(
    lens: list[int],
    groups: list[SharedGroup],
    heads: tuple[int, int, int],
    *,
    programs: int = 12,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> SharedStep:
    num_heads, kv_heads, size = heads
    pages, table = draw_pages(lens, kv_heads, size, PAGE)
    whole = table.clone()
    for rows, tokens in groups:
        assert tokens % PAGE == 0 and all(lens[row] > tokens for row in rows)
        for row in rows[1:]:
            whole[row, : tokens // PAGE] = table[rows[0], : tokens // PAGE]
            table[row, : tokens // PAGE] = 0
    q = torch.randn(len(lens), num_heads, size, generator=torch.Generator().manual_seed(1))
    layout = PrefixLayout(
        max_rows=len(lens) + 3, heads=num_heads // kv_heads, kv_heads=kv_heads, programs=programs
    )
    packed = torch.from_numpy(layout.pack(groups)).to(device)
    return SharedStep(
        q_RNH=q.to(device, dtype),
        pages=pages.to(device, dtype),
        table_RC=table.to(device),
        whole_RC=whole.to(device),
        lens_R=torch.tensor(lens, device=device),
        shared=layout.views(packed, len(lens)),
    )
