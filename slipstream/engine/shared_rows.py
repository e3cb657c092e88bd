# pyright: reportUnknownMemberType=false
"""Which rows of a decode step begin with the same pages, and where does a kernel find that?

The runner tells of every plan; what is kept of a row is how its block tables begin. When the rows of a step
are others than the last one's, groups are looked for and written to tensors that stay where they are, so that
a captured step can be replayed for other groups.
Invariants: of a row only those blocks count that a decode step has behind it whatever its length: full ones
before the last token that it was admitted with. Nothing here waits for the device or reads from it.
R rows of a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from slipstream.attention.base import AttentionBackend
from slipstream.attention.shared_prefix import Beginning, SharingRule, find_groups
from slipstream.core.cache_group import CacheGroup
from slipstream.core.plan import StepPlan
from slipstream.kernels.plugins import KERNELS
from slipstream.kernels.shared_prefix import (
    TILE_LINES,
    PrefixLayout,
    SharedGroup,
    SharedPrefixes,
    num_programs,
)


def heads_of_kv_head(config: Any) -> int:
    """Return how many query heads use a kv head, 0 for a model that does not say."""
    num_heads, kv_heads = getattr(config, "num_heads", 0), getattr(config, "num_kv_heads", 0)
    return num_heads // kv_heads if kv_heads else 0


def shares_beginnings(
    backend: AttentionBackend, model: Any, groups: Sequence[CacheGroup], max_rows: int
) -> bool:
    """Say whether common beginnings can be read once: by this backend, and for a model with full attention
    whose heads fit a tile; a kernel from outside for one-token rows reads each row by itself."""
    is_served = backend.capability.cascade and 1 <= heads_of_kv_head(model.config) <= TILE_LINES
    is_ours = "paged_decode" not in KERNELS.on_gpu
    return is_served and is_ours and max_rows > 1 and any(group.kind == "full" for group in groups)


class SharedRows:
    """How the rows of one runner begin, and the groups of its last decode step on the device."""

    def __init__(
        self,
        groups: Sequence[CacheGroup],
        *,
        heads: int,
        max_rows: int,
        kv_dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """`heads` are the query heads of one kv head."""
        full = [group for group in groups if group.kind == "full"]
        first = full[0]
        self._groups = [idx for idx, group in enumerate(groups) if group.kind == "full"]
        self._block_tokens = first.block_tokens
        token_bytes = 2 * first.heads * first.head_dim * kv_dtype.itemsize
        self._rule = SharingRule.create(page_tokens=first.block_tokens, token_bytes=token_bytes)
        self._layout = PrefixLayout(
            max_rows=max_rows, heads=heads, kv_heads=first.heads, programs=num_programs(device)
        )
        self._packed = torch.zeros(self._layout.num_ints, dtype=torch.int32, device=device)
        # The leading pages of each row by cache group, how many of them count, and the same to compare.
        self._pages: dict[int, list[list[int]]] = {}
        self._most: dict[int, int] = {}
        self._beginnings: dict[int, Beginning] = {}
        self._last_rows: list[int] | None = None
        self._last_groups: list[SharedGroup] = []
        self._written: list[SharedGroup] | None = None
        self.num_steps = self.num_rows = self.num_spared_positions = 0

    def apply(self, plan: StepPlan) -> None:
        """Note which rows come and go, and what is added to a table that is still to be filled."""
        for row in plan.removed:
            if self._pages.pop(row, None) is not None:
                self._changed(row)
        for init in plan.added:
            most = (len(init.tokens) - 1) // self._block_tokens
            self._most[init.row] = most
            self._pages[init.row] = [list(init.blocks[group][:most]) for group in self._groups]
            self._changed(init.row)
        for idx, group in enumerate(self._groups):
            for row, blocks in plan.new_blocks.get(group, ()):
                pages, most = self._pages[row][idx], self._most[row]
                if len(pages) < most:
                    pages += blocks[: most - len(pages)]
                    self._changed(row)

    def _changed(self, row: int) -> None:
        self._beginnings.pop(row, None)
        self._last_rows = None

    def of_step(self, rows: list[int]) -> bool:
        """Say whether any rows of a decode step share a beginning; if so, the device knows from here on."""
        if self._last_rows != rows:
            for row in rows:
                if row not in self._beginnings:
                    self._beginnings[row] = Beginning(self._pages[row])
            self._last_groups = find_groups([self._beginnings[row] for row in rows], self._rule)
            self._last_rows = list(rows)
            if self._last_groups and self._last_groups != self._written:
                self._write(self._last_groups)
        return bool(self._last_groups)

    def forget_step(self) -> None:
        """Let no row share anything, until the next step is looked at."""
        self._last_rows, self._written = None, None
        self._packed.zero_()

    def _write(self, groups: list[SharedGroup]) -> None:
        packed = torch.from_numpy(self._layout.pack(groups))
        if self._packed.is_cuda:
            # From ordinary memory the copy could wait for the steps before it.
            packed = packed.pin_memory()
        self._packed.copy_(packed, non_blocking=True)
        self._written = groups

    def views(self, num_rows: int) -> SharedPrefixes:
        """Return what a step of so many rows, padding included, reads: the same memory for any groups."""
        return self._layout.views(self._packed, num_rows)

    def count(self) -> None:
        """Count a step that read the last step's groups once."""
        self.num_steps += 1
        self.num_rows += sum(len(group.rows) for group in self._last_groups)
        self.num_spared_positions += sum((len(group.rows) - 1) * group.tokens for group in self._last_groups)
