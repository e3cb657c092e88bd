"""Which pages hold one sequence, and how far are they keyed? Plain data, mutated only by `KvCache`."""

from __future__ import annotations


class BlockTable:
    """Pages of one sequence per group.

    `pages[g][b]` holds tokens b * block_tokens onwards (NULL_PAGE: given back, behind a window). `capacity`
    counts the tokens that the pages can hold. `keys` are the keys of the full blocks of the known tokens,
    `num_published` how many of them other requests can find. `first_live[g]` is the first block not given
    back. `num_reused` blocks came from the index and belong to others too.
    """

    __slots__ = ("capacity", "first_live", "keys", "num_published", "num_reused", "pages", "root", "tail_key")

    def __init__(self, num_groups: int, root: bytes) -> None:
        self.root = root
        self.keys: list[bytes] = []
        self.reset(num_groups)

    def reset(self, num_groups: int) -> None:
        """Forget every page (not the keys: they follow from the tokens)."""
        self.pages: list[list[int]] = [[] for _ in range(num_groups)]
        self.first_live = [0] * num_groups
        self.capacity = 0
        self.num_published = 0
        self.num_reused = 0
        self.tail_key: bytes | None = None

    def parent_of(self, block: int) -> bytes:
        return self.keys[block - 1] if block else self.root
