"""Which pages hold one sequence, and how far are they keyed? Plain data, mutated only by `KvCache`."""

from __future__ import annotations

from slipstream.core.kv_retention import KvCacheRetentionConfig


class BlockTable:
    """Pages of one sequence per group.

    `pages[g][b]` holds tokens b * block_tokens onwards (NULL_PAGE: given back, behind a window). `capacity`
    counts the tokens that the pages can hold. `keys` are the keys of the full blocks of the known tokens,
    `num_published` how many of them other requests can find. `first_live[g]` is the first block not given
    back. `num_reused` blocks came from the index and belong to others too; `copied` are the pages whose
    content was copied in. `retention` says how long what this sequence of `num_prompt` prompt tokens leaves
    is worth keeping. `left` are (last step that uses them, pages given back) of steps in flight. The
    last three outlive `reset`, so that a step in flight can still be found to have read a bad page.
    """

    __slots__ = (
        "capacity",
        "copied",
        "first_live",
        "keys",
        "left",
        "num_prompt",
        "num_published",
        "num_reused",
        "pages",
        "retention",
        "root",
        "tail_key",
    )

    def __init__(
        self,
        num_groups: int,
        root: bytes,
        *,
        retention: KvCacheRetentionConfig | None = None,
        num_prompt: int = 0,
    ) -> None:
        self.root = root
        self.retention = retention
        self.num_prompt = num_prompt
        self.keys: list[bytes] = []
        self.num_reused = 0
        self.copied: list[int] = []
        self.left: list[tuple[int, list[int]]] = []
        self.reset(num_groups)

    def reset(self, num_groups: int) -> None:
        """Forget every page (not the keys: they follow from the tokens)."""
        self.pages: list[list[int]] = [[] for _ in range(num_groups)]
        self.first_live = [0] * num_groups
        self.capacity = 0
        self.num_published = 0
        self.tail_key: bytes | None = None

    def parent_of(self, block: int) -> bytes:
        return self.keys[block - 1] if block else self.root

    def has_read(self, bad: set[int]) -> bool:
        """Say whether what this table holds, or what its steps in flight wrote, depends on a bad page."""
        left = (pages for _, pages in self.left)
        return any(not bad.isdisjoint(pages) for pages in (*self.pages, self.copied, *left))

    def first_of(self, bad: set[int]) -> int:
        """Return the first block that holds a bad page; without one in the table, the first own block."""
        found = (block for pages in self.pages for block, page in enumerate(pages) if page in bad)
        return min(found, default=self.num_reused)
