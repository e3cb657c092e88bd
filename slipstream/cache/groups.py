"""How many groups, of how many layers, with how large a page? Completes what a model declares.

Invariant: every resolved group has the same `page_bytes` and `block_tokens`, so that one pool of equal pages
serves them all and block i of a sequence means the same tokens in every group. A kind's layers are split into
groups of equal size (the hybrid layout that vLLM describes in its "hybrid KV cache manager" design note); the
last group of a kind may be padded with an unused place.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from slipstream.core.cache_group import CacheGroup
from slipstream.core.errors import ConfigError, UnsupportedError

MIN_BLOCK_TOKENS = 8
MAX_BLOCK_TOKENS = 128
SERVED_KINDS = ("full", "window")
# A split may leave at most this share of all places unused.
MAX_PADDING = 0.10


def resolve(declared: Sequence[CacheGroup], *, block_tokens: int, element_bytes: int) -> list[CacheGroup]:
    """Split and complete the declared groups.

    `element_bytes` is the size of one K or V element. Raises ConfigError for a block size out of bounds and
    UnsupportedError for a kind or a mix of head shapes that this version does not serve.
    """
    if not MIN_BLOCK_TOKENS <= block_tokens <= MAX_BLOCK_TOKENS or block_tokens & (block_tokens - 1):
        raise ConfigError(
            f"tokens_per_block is {block_tokens}; it must be a power of two from {MIN_BLOCK_TOKENS} to "
            f"{MAX_BLOCK_TOKENS} (32 suits most models)."
        )
    for group in declared:
        if group.kind not in SERVED_KINDS:
            raise UnsupportedError(
                f"Cache groups of kind {group.kind!r} are not served by this version; "
                f"served: {', '.join(SERVED_KINDS)}."
            )
    shapes = {(group.heads, group.head_dim) for group in declared}
    if len(shapes) != 1:
        raise UnsupportedError(
            f"Layers with different KV head shapes (heads, head_dim) {sorted(shapes)} cannot share one page "
            "pool in this version."
        )
    size = _group_size([len(group.layers) for group in declared])
    heads, head_dim = shapes.pop()
    page_bytes = size * 2 * block_tokens * heads * head_dim * element_bytes
    return [
        dataclasses.replace(
            group,
            layers=group.layers[first : first + size],
            block_tokens=block_tokens,
            page_bytes=page_bytes,
            match_granularity=block_tokens,
        )
        for group in declared
        for first in range(0, len(group.layers), size)
    ]


def _group_size(counts: Sequence[int]) -> int:
    """Return the largest group size whose padding stays under `MAX_PADDING` (1 always does)."""
    total = sum(counts)
    for size in range(min(counts), 1, -1):
        places = sum(-(-count // size) * size for count in counts)
        if places - total <= MAX_PADDING * total:
            return size
    return 1
