"""What must the cache keep for some layers? Declared by the model, completed by `cache.groups.resolve`."""

from __future__ import annotations

import dataclasses
from typing import Literal

CacheKind = Literal["full", "window", "chunk", "latent", "state", "cross", "draft"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class CacheGroup:
    """Layers that share one block table.

    `window` is the number of positions a query sees, its own included (0 where the kind has none). The last
    three fields are 0 until `resolve`: tokens per block, bytes per page (equal over all groups), and the
    number of tokens at whose multiples a prefix may match.
    """

    layers: tuple[int, ...]
    kind: CacheKind
    heads: int
    head_dim: int
    window: int = 0
    block_tokens: int = 0
    page_bytes: int = 0
    match_granularity: int = 0
