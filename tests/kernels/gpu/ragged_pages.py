"""What do the pages of rows of many lengths hold? Random keys and values; NaN where nobody reads."""

from __future__ import annotations

import math
import random

import torch
from torch import Tensor


def draw_pages(
    lens: list[int], kv_heads: int, size: int, page_tokens: int, *, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Return pages [P, 2, t, K, H] and a table [R, C] whose unused entries name page 0, all of it NaN."""
    blocks = [-(-length // page_tokens) for length in lens]
    numbers = list(range(1, 1 + sum(blocks)))
    random.Random(seed).shuffle(numbers)
    generator = torch.Generator().manual_seed(seed)
    pages = torch.randn(1 + sum(blocks), 2, page_tokens, kv_heads, size, generator=generator)
    pages[0] = math.nan
    table = torch.zeros(len(lens), max(1, *blocks), dtype=torch.int32)
    for row, length in enumerate(lens):
        for block in range(blocks[row]):
            table[row, block] = numbers.pop()
        if length % page_tokens:
            pages[int(table[row, blocks[row] - 1]), :, length % page_tokens :] = math.nan
    return pages, table
