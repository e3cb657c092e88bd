"""What may the scheduler ask of the cache? Look a prefix up, take it, grow, publish, trim, give back.

Invariants: a hit is the meet over all groups; at least the last known token is always recomputed, since its
logits are wanted; a page that others may read is never written, so a partly matching block is copied; pages
are given back only behind the last step that names them.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Sequence

from slipstream.cache.block_table import BlockTable
from slipstream.cache.keys import TOKEN_BYTES, block_key, chain_keys, content_of, root_key
from slipstream.cache.kv_events import Event, KvEvents
from slipstream.cache.pool import NULL_PAGE, PagePool
from slipstream.cache.prefix_index import Node, PrefixIndex
from slipstream.core.cache_group import CacheGroup
from slipstream.core.errors import ConfigError
from slipstream.core.kv_retention import KvCacheRetentionConfig


@dataclasses.dataclass(frozen=True, slots=True)
class Hit:
    """What the cache holds of a sequence's known tokens.

    `nodes` are the full blocks to share, `partial` a block whose first `partial_len` tokens match and are
    copied. `wanted` are the keys of the following blocks, in order, the last one possibly a tail: whoever
    promised them saves this sequence the work.
    """

    nodes: tuple[Node, ...] = ()
    partial: Node | None = None
    partial_len: int = 0
    wanted: tuple[bytes, ...] = ()


NO_HIT = Hit()


class KvCache:
    """The pages of one engine replica, in resolved groups of equal pages."""

    def __init__(
        self,
        groups: Sequence[CacheGroup],
        num_pages: int,
        *,
        enable_block_reuse: bool = True,
        enable_partial_reuse: bool = True,
        event_buffer_max_size: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.groups = list(groups)
        self.block_tokens = groups[0].block_tokens
        self._root = root_key()
        self.enable_block_reuse = enable_block_reuse
        self.enable_partial_reuse = enable_block_reuse and enable_partial_reuse
        self._windows = [group.window if group.kind == "window" else 0 for group in groups]
        self._events: KvEvents | None = None
        if event_buffer_max_size:
            self._events = KvEvents(max_size=event_buffer_max_size, block_tokens=self.block_tokens)
        self._index = PrefixIndex(len(groups), self._events)
        self.pool = PagePool(num_pages, on_evict=self._index.forget_page, clock=clock)

    def pages_for(self, num_tokens: int, *, max_span: int) -> int:
        """Return the most pages that a sequence of `num_tokens`, run in spans of `max_span`, ever holds."""
        return self.pages_missing(NO_HIT, num_tokens, max_span=max_span)

    @property
    def num_free_tokens(self) -> int:
        """Tokens for which one sequence could get pages now."""
        return self.pool.num_free // len(self.groups) * self.block_tokens

    def pages_missing(self, hit: Hit, num_tokens: int, *, max_span: int) -> int:
        """Return how many new pages a sequence of `num_tokens` needs at most beside those of a hit."""
        blocks = -(-num_tokens // self.block_tokens) - len(hit.nodes)
        return sum(
            blocks if not window else min(blocks, self._window_blocks(window + max_span) + 1)
            for window in self._windows
        )

    def pages_ahead(self, table: BlockTable, num_tokens: int, *, max_span: int) -> int:
        """Return how many more pages a running sequence may take until it has `num_tokens`.

        Behind a window it takes new pages for those it gives back, but a page that others hold too does not
        come back when this sequence leaves it: only pages of its own count.
        """
        blocks = -(-num_tokens // self.block_tokens) - table.capacity // self.block_tokens
        ahead = 0
        for window, held, first in zip(self._windows, table.pages, table.first_live, strict=True):
            bound = blocks
            if window:
                own = sum(self.pool.references(page) == 1 for page in held[first:])
                bound = min(blocks, self._window_blocks(window + max_span) + 1 - own)
            ahead += max(0, bound)
        return ahead

    def pages_of_fork(self, position: int, num_tokens: int) -> int:
        """Return the most pages of its own that a fork at `position` holds until it has `num_tokens`."""
        blocks = -(-num_tokens // self.block_tokens) - position // self.block_tokens
        return sum(
            min(blocks, self._window_blocks(window) + 2) if window else blocks for window in self._windows
        )

    def _window_blocks(self, window: int) -> int:
        """Return how many whole blocks before a block border the next query of a window can see."""
        return -(-(window - 1) // self.block_tokens)

    def new_table(
        self,
        *,
        salt: str | None = None,
        retention: KvCacheRetentionConfig | None = None,
        num_prompt: int = 0,
    ) -> BlockTable:
        """Return an empty table; `retention` speaks of a prompt of `num_prompt` tokens and what follows."""
        root = self._root if salt is None else root_key(salt=salt)
        return BlockTable(len(self.groups), root, retention=retention, num_prompt=num_prompt)

    def lookup(self, table: BlockTable, tokens: Sequence[int], *, step_id: int) -> Hit:
        """Find the longest reusable start of `tokens` for a sequence admitted by step `step_id`.

        Changes nothing but `table.keys`. O(blocks of `tokens`).
        """
        if not self.enable_block_reuse:
            return NO_HIT
        self._extend_keys(table, tokens)
        usable = (len(tokens) - 1) // self.block_tokens
        chain = self._longest_chain(table.keys[:usable])
        matched = len(chain)
        partial, length = None, 0
        if self.enable_partial_reuse:
            first = matched * self.block_tokens
            rest = tokens[first : min(first + self.block_tokens, len(tokens) - 1)]
            parent = table.parent_of(matched)
            partial, length = self._index.longest_partial(parent, content_of(rest), before_step=step_id)
        # A start that holds all but the last token leaves nothing that is worth waiting for.
        is_all = matched * self.block_tokens + length == len(tokens) - 1
        wanted = () if is_all else tuple(self._wanted(table, tokens, matched))
        return Hit(tuple(chain), partial, length, wanted)

    def no_hit(self, table: BlockTable, tokens: Sequence[int]) -> Hit:
        """Return the hit of a sequence that computes everything itself."""
        return Hit(wanted=tuple(self._wanted(table, tokens, 0)))

    def _wanted(self, table: BlockTable, tokens: Sequence[int], matched: int) -> list[bytes]:
        wanted = table.keys[matched:]
        tail = len(tokens) % self.block_tokens
        if tail and self.enable_partial_reuse:
            rest = content_of(tokens[len(tokens) - tail :])
            wanted.append(block_key(table.parent_of(len(table.keys)), rest))
        return wanted

    def _extend_keys(self, table: BlockTable, tokens: Sequence[int]) -> None:
        """Give a table the key of every full block of `tokens` that it lacks; known content is not hashed."""
        first, count = len(table.keys), len(tokens) // self.block_tokens
        if first >= count:
            return
        content = content_of(tokens[first * self.block_tokens : count * self.block_tokens])
        size = self.block_tokens * TOKEN_BYTES
        found = self._index.follow(table.parent_of(first), content, size)
        table.keys += found
        table.keys += chain_keys(table.parent_of(first + len(found)), content[len(found) * size :], size)

    def _longest_chain(self, keys: Sequence[bytes]) -> list[Node]:
        """Return the nodes of the longest start of `keys` at whose end every group can go on."""
        if not any(self._windows):
            return self._index.complete_chain(keys)
        needs = [self._window_blocks(window) if window else 0 for window in self._windows]
        runs = [0] * len(needs)
        nodes: list[Node] = []
        best = 0
        for key in keys:
            node = self._index.get(key)
            if node is None:
                break
            nodes.append(node)
            is_complete, is_broken = True, False
            for group, page in enumerate(node.pages):
                runs[group] = runs[group] + 1 if page != NULL_PAGE else 0
                if self._windows[group]:
                    is_complete &= runs[group] >= min(len(nodes), needs[group])
                else:
                    is_broken |= page == NULL_PAGE
            if is_broken:
                break
            if is_complete:
                best = len(nodes)
        return nodes[:best]

    def num_idle(self, hit: Hit) -> int:
        """Return how many pages of a hit lie on the free list: taking the hit takes them off it."""
        return self.pool.count_idle(*self._shared(hit), hit.partial.pages if hit.partial else ())

    def _shared(self, hit: Hit) -> list[list[int]]:
        """Return the pages per group that a hit shares; behind a window there is nothing to hold."""
        count = len(hit.nodes)
        shared: list[list[int]] = []
        for group, window in enumerate(self._windows):
            first = max(0, count - self._window_blocks(window)) if window else 0
            pages = [node.pages[group] for node in hit.nodes[first:]]
            shared.append([NULL_PAGE] * first + pages)
        return shared

    def admit(
        self, table: BlockTable, hit: Hit, num_tokens: int, *, step_id: int
    ) -> list[tuple[int, int]] | None:
        """Fill an empty table with a hit and pages up to `num_tokens`.

        Returns the page copies that step `step_id` must make, or None, with nothing changed, where the pool
        is short.
        """
        shared = self._shared(hit)
        sources = list(hit.partial.pages) if hit.partial else []
        self.pool.acquire(*shared, sources)
        table.pages = shared
        table.first_live = [_count_leading_nulls(pages) for pages in shared]
        table.num_published = table.num_reused = len(hit.nodes)
        table.capacity = len(hit.nodes) * self.block_tokens
        grown = self.extend(table, num_tokens)
        if grown is None:
            # Nothing was named by a step yet: the references taken above fall at once.
            for pages in (*shared, sources):
                self.pool.release(pages, after_step=-1)
            table.reset(len(self.groups))
            return None
        self._retain(table, 0, [pages[: len(hit.nodes)] for pages in table.pages])
        self.pool.release(sources, after_step=step_id)
        table.copied = sources
        table.left = []
        copies = [(source, table.pages[group][len(hit.nodes)]) for group, source in enumerate(sources)]
        # A copy overwrites the whole page; zeroing it too would be two writes of one step, in no order.
        self.pool.take_tainted(page for _, page in copies)
        return copies + self.zeroing(grown)

    def fork(
        self, table: BlockTable, source: BlockTable, num_tokens: int, *, step_id: int
    ) -> list[tuple[int, int]] | None:
        """Fill an empty table with the first `num_tokens` of another, and room for one more.

        Whole blocks are shared, the one begun is copied. All of it is computed by steps before `step_id`,
        which makes the page copies returned; None, with nothing changed, where the pool is short.
        """
        count, begun = divmod(num_tokens, self.block_tokens)
        shared = [pages[:count] for pages in source.pages]
        sources = [pages[count] for pages in source.pages] if begun else []
        held = [*shared, sources]
        self.pool.acquire(*held)
        table.pages = shared
        table.first_live = list(source.first_live)
        table.keys = source.keys[:count]
        table.num_published = min(source.num_published, count)
        table.num_reused = count
        table.capacity = count * self.block_tokens
        grown = self.extend(table, num_tokens + 1)
        if grown is None:
            for pages in held:
                self.pool.release(pages, after_step=-1)
            table.reset(len(self.groups))
            return None
        self.pool.release(sources, after_step=step_id)
        table.copied = sources
        table.left = []
        copies = [(page, pages[0]) for page, pages in zip(sources, grown, strict=False)]
        self.pool.take_tainted(page for _, page in copies)
        return copies + self.zeroing(grown)

    def zeroing(self, grown: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
        """Return the copies that zero those of the new pages whose last content may be NaN."""
        tainted = self.pool.take_tainted(page for pages in grown for page in pages)
        return [(NULL_PAGE, page) for page in tainted]

    def extend(self, table: BlockTable, num_tokens: int) -> list[list[int]] | None:
        """Give a table pages for `num_tokens`; returns the new pages per group, None if the pool is short."""
        blocks = -(-num_tokens // self.block_tokens)
        missing = blocks - table.capacity // self.block_tokens
        if missing <= 0:
            return [[] for _ in self.groups]
        pages = self.pool.allocate(missing * len(self.groups))
        if pages is None:
            return None
        grown = [pages[group * missing : (group + 1) * missing] for group in range(len(self.groups))]
        self._retain(table, blocks - missing, grown)
        for held, new in zip(table.pages, grown, strict=True):
            held += new
        table.capacity = blocks * self.block_tokens
        return grown

    def _retain(self, table: BlockTable, first_block: int, taken: Sequence[Sequence[int]]) -> None:
        """Give the pages per group that a table takes, from a block on, the priorities of its request."""
        if table.retention is None:
            return
        for pages in taken:
            for block, page in enumerate(pages, first_block):
                kept = table.retention.of_token(block * self.block_tokens, table.num_prompt)
                if page != NULL_PAGE and kept is not None:
                    self.pool.set_retention(page, *kept)

    def publish(
        self, table: BlockTable, tokens: Sequence[int], num_planned: int, *, step_id: int
    ) -> list[bytes]:
        """Make findable every full block whose tokens are known and whose computing step is planned.

        `num_planned` tokens of the sequence are computed by step `step_id` or before. Returns the new keys.
        """
        complete = min(len(tokens), num_planned) // self.block_tokens
        if not self.enable_block_reuse or complete <= table.num_published:
            return []
        self._extend_keys(table, tokens)
        first = table.num_published
        content = content_of(tokens[first * self.block_tokens : complete * self.block_tokens])
        size = self.block_tokens * TOKEN_BYTES
        for block in range(first, complete):
            pages = [held[block] for held in table.pages]
            if table.tail_key is not None:
                self._index.withdraw([page for page in pages if page != NULL_PAGE], self.pool)
                table.tail_key = None
            start = (block - first) * size
            self._index.insert(
                key=table.keys[block],
                parent=table.parent_of(block),
                content=content[start : start + size],
                pages=pages,
                step_id=step_id,
                pool=self.pool,
            )
        table.num_published = complete
        return table.keys[first:complete]

    def publish_tail(self, table: BlockTable, tokens: Sequence[int], *, step_id: int) -> bytes | None:
        """Make the incomplete last block of `tokens`, all planned, findable for copies; returns its key."""
        tail = len(tokens) % self.block_tokens
        block = len(tokens) // self.block_tokens
        if not self.enable_partial_reuse or not tail or table.num_published != block:
            return None
        parent = table.parent_of(block)
        rest = content_of(tokens[block * self.block_tokens :])
        key = block_key(parent, rest)
        if table.tail_key is not None:
            self._index.withdraw([held[block] for held in table.pages], self.pool)
            table.tail_key = None
        if self._index.get(key) is None:
            table.tail_key = key
            self._index.insert(
                key=key,
                parent=parent,
                content=rest,
                pages=[held[block] for held in table.pages],
                step_id=step_id,
                pool=self.pool,
            )
        return key

    def trim(self, table: BlockTable, next_position: int, *, after_step: int) -> None:
        """Give back the blocks that no query from `next_position` on can see through any window."""
        for group, window in enumerate(self._windows):
            if not window:
                continue
            first_seen = min(max(0, next_position - window + 1) // self.block_tokens, len(table.pages[group]))
            first_live = table.first_live[group]
            if first_seen > first_live:
                held = table.pages[group]
                self._give_back(table, held[first_live:first_seen], after_step=after_step)
                held[first_live:first_seen] = [NULL_PAGE] * (first_seen - first_live)
                table.first_live[group] = first_seen

    def release(self, table: BlockTable, *, after_step: int) -> None:
        """Give back every page of a table, last blocks first, so that shared starts are evicted last."""
        for pages, first in zip(table.pages, table.first_live, strict=True):
            self._give_back(table, pages[first:][::-1], after_step=after_step)
        table.reset(len(self.groups))

    def _give_back(self, table: BlockTable, pages: list[int], *, after_step: int) -> None:
        table.left = [entry for entry in table.left if entry[0] > self.pool.last_retired]
        table.left.append((after_step, pages))
        self.pool.release(pages, after_step=after_step)

    def condemn(self, table: BlockTable, bad: set[int] | None = None) -> set[int]:
        """Withdraw and taint what a sequence wrote itself, or what it holds from its first `bad` page on.

        Returns the pages. Of a table that steps in flight outlive, the pages it shared go too: they cost
        others a recomputation.
        """
        first = table.num_reused if bad is None else table.first_of(bad)
        pages = {page for held in table.pages for page in held[first:]}
        pages.update(page for _, given_back in table.left for page in given_back)
        for key in table.keys[first:]:
            node = self._index.get(key)
            pages.update(node.pages if node else ())
        return self.condemn_pages(pages)

    def condemn_pages(self, pages: Iterable[int]) -> set[int]:
        """Withdraw and taint pages with bad content; returns them, the null page left out."""
        bad = set(pages) - {NULL_PAGE}
        self._index.withdraw(sorted(bad), self.pool)
        for page in bad:
            self.pool.taint(page)
        return bad

    def reset_prefix_cache(self) -> None:
        """Forget every reusable prefix; running sequences are not touched."""
        self._index.clear(self.pool)

    def drain_kv_events(self) -> list[Event]:
        """Return what became findable or was forgotten since the last call; see `KvEvents` for the fields."""
        if self._events is None:
            raise ConfigError(
                "KV cache events are off; start the engine with KvCacheConfig(event_buffer_max_size=N), for "
                "example 1024."
            )
        return self._events.drain()


def _count_leading_nulls(pages: Sequence[int]) -> int:
    for count, page in enumerate(pages):
        if page != NULL_PAGE:
            return count
    return len(pages)
