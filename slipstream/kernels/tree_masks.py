"""Which tokens of a span see which where the span is a tree of drafts? One bit set a token, and its depth.

A tree span is n tokens of one row behind its context, in the slots of the positions `start` to
`start + n - 1`. `parents[i]` is the span offset of token i's parent, always an earlier one, or -1: the last
committed token, so that several of -1 are alternatives for the same place. Token i sees the context, its
ancestors and itself. It stands at the rotary position start + depth, 0 being the depth behind a parent of -1:
siblings share a position, not a slot. A window counts in depths: a token sees what it would if its path were
run alone, token by token.
Invariant: bit j of a token's set says that it sees the token of offset j; its own is among them, so 0 is a
token of an ordinary span, and one less than the number of bits is the depth.
Source: tree attention of Miao et al., SpecInfer, arXiv 2305.09781.
T tokens of the span, L positions.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from slipstream.core.errors import EngineError

# The bits of an int64. What is drafted at once is far less: each token more is accepted more rarely.
MAX_TREE_TOKENS = 64
# Trees whose bits are remembered; a method drafts in few shapes.
MAX_REMEMBERED = 256


class Tree(NamedTuple):
    """Per token: the offsets it sees as the bits of a signed int64, and how deep it stands."""

    bits: tuple[int, ...]
    depths: tuple[int, ...]


@functools.lru_cache(MAX_REMEMBERED)
def tree_of(parents: tuple[int, ...]) -> Tree:
    """Return a tree's bits and depths. Raises EngineError for what is no tree, or too large a one."""
    if len(parents) > MAX_TREE_TOKENS:
        raise EngineError(
            f"{len(parents)} tokens are given; at most {MAX_TREE_TOKENS} are served: draft fewer."
        )
    seen: list[int] = []
    depths: list[int] = []
    for offset, parent in enumerate(parents):
        if not -1 <= parent < offset:
            raise EngineError(
                f"parents[{offset}]={parent} is given; a parent is an earlier offset of its span, here at "
                f"most {offset - 1}, or -1 for the last committed token."
            )
        seen.append((seen[parent] if parent >= 0 else 0) | 1 << offset)
        depths.append(depths[parent] + 1 if parent >= 0 else 0)
    bits = tuple(one - (1 << 64) if one >> 63 else one for one in seen)
    return Tree(bits, tuple(depths))


def require_tree(parents: Sequence[int], *, row: int, num_tokens: int) -> None:
    """Raise EngineError naming the row where a span's parents are no tree of its tokens."""
    if len(parents) != num_tokens:
        raise EngineError(
            f"The span of row {row} has {num_tokens} tokens and {len(parents)} parents; give one for each."
        )
    try:
        tree_of(tuple(parents))
    except EngineError as error:
        raise EngineError(f"The span of row {row} is no tree that can run: {error}") from None


def visible_positions(tree_T: Tensor, *, first: int, length: int, window: int) -> Tensor:
    """Return [T, L] booleans: which of the positions [first, length) each token of a tree span sees.

    The span's K and V stand in the last T positions, behind `first`. `window` is 0 where absent.
    """
    num_tokens, device = len(tree_T), tree_T.device
    start = length - num_tokens
    sees_TT = (tree_T[:, None] >> torch.arange(num_tokens, device=device) & 1).bool()
    context = torch.arange(first, start, device=device)
    sees_TL = torch.cat((sees_TT.new_ones(num_tokens, len(context)), sees_TT), dim=1)
    if window:
        place_T = start + sees_TT.sum(1) - 1
        sees_TL &= torch.cat((context, place_T)) > place_T[:, None] - window
    return sees_TL
