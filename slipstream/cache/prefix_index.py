"""Which pages already hold the K and V of these tokens?

A node is one block's content: its key, its tokens, and a page per group (absent where that group evicted it).
Lookup walks a chain of keys through one dictionary, or, where they are not known yet, from content to
content: what is found needs no hash. The children of a key are scanned only for a partial match of the block
after the last full hit.
"""

from __future__ import annotations

from collections.abc import Sequence

from slipstream.cache.keys import TOKEN_BYTES, tokens_of
from slipstream.cache.kv_events import KvEvents
from slipstream.cache.pool import NULL_PAGE, PagePool

# Children compared for a partial match; more siblings than this are not worth the time of a plan.
MAX_SCANNED_CHILDREN = 16


class Node:
    """One block; `content` is that of `keys.content_of`. `step_id`'s forward writes its last token."""

    __slots__ = ("content", "key", "num_pages", "pages", "parent", "step_id")

    def __init__(self, key: bytes, parent: bytes, content: bytes, num_groups: int, step_id: int) -> None:
        self.key = key
        self.parent = parent
        self.content = content
        self.pages = [NULL_PAGE] * num_groups
        self.num_pages = 0
        self.step_id = step_id


class PrefixIndex:
    """Key -> node, parent key -> content -> child, page -> node. Every change is told to `events`."""

    def __init__(self, num_groups: int, events: KvEvents | None = None) -> None:
        self._num_groups = num_groups
        self._events = events
        self._nodes: dict[bytes, Node] = {}
        self._children: dict[bytes, dict[bytes, Node]] = {}
        self._node_of_page: dict[int, Node] = {}

    def __len__(self) -> int:
        return len(self._nodes)

    def get(self, key: bytes) -> Node | None:
        return self._nodes.get(key)

    def follow(self, parent: bytes, content: bytes, block_bytes: int) -> list[bytes]:
        """Return the keys of the blocks of `content` after `parent`, up to the first that is not here.

        A key stands for its parent and content, so what has both has the key.
        """
        children = self._children
        keys: list[bytes] = []
        for first in range(0, len(content), block_bytes):
            siblings = children.get(parent)
            node = None if siblings is None else siblings.get(content[first : first + block_bytes])
            if node is None:
                break
            parent = node.key
            keys.append(parent)
        return keys

    def complete_chain(self, keys: Sequence[bytes]) -> list[Node]:
        """Return the nodes of the longest start of `keys` that have a page in every group."""
        nodes: list[Node] = []
        for node in map(self._nodes.get, keys):
            if node is None or node.num_pages < self._num_groups:
                break
            nodes.append(node)
        return nodes

    def insert(
        self,
        *,
        key: bytes,
        parent: bytes,
        content: bytes,
        pages: Sequence[int],
        step_id: int,
        pool: PagePool,
    ) -> Node:
        """Add a block's pages (NULL_PAGE: that group has none); a group that already has one keeps it."""
        node = self._nodes.get(key)
        if node is None:
            node = self._nodes[key] = Node(key, parent, content, self._num_groups, step_id)
            self._children.setdefault(parent, {})[content] = node
        for group, page in enumerate(pages):
            if page == NULL_PAGE or node.pages[group] != NULL_PAGE or page in self._node_of_page:
                continue
            node.pages[group] = page
            node.num_pages += 1
            node.step_id = max(node.step_id, step_id)
            self._node_of_page[page] = node
            pool.set_keyed(page, True)
            if self._events is not None:
                self._events.stored(group, key=key, parent=node.parent, tokens=tokens_of(content))
        if node.num_pages == 0:
            self._remove(node)
        return node

    def forget_page(self, page: int) -> None:
        """Drop one page from its node (it was evicted or its content is bad), and the node when empty."""
        node = self._node_of_page.pop(page, None)
        if node is None:
            return
        group = node.pages.index(page)
        node.pages[group] = NULL_PAGE
        node.num_pages -= 1
        if self._events is not None:
            self._events.removed(group, key=node.key)
        if node.num_pages == 0:
            self._remove(node)

    def withdraw(self, pages: Sequence[int], pool: PagePool) -> None:
        """Forget pages whose owner still holds them, or whose content must not be found again."""
        for page in pages:
            if page in self._node_of_page:
                self.forget_page(page)
                pool.set_keyed(page, False)

    def longest_partial(self, parent: bytes, content: bytes, *, before_step: int) -> tuple[Node | None, int]:
        """Return the child of `parent` with the longest common start with `content`, and its tokens' number.

        Only complete nodes written by a step before `before_step` count: a page copy runs ahead of the
        forward of its own step. Of very many children the newest are looked at.
        """
        best: Node | None = None
        best_length = 0
        head = content[:TOKEN_BYTES]
        if not head:
            return None, 0
        for scanned, node in enumerate(reversed(self._children.get(parent, {}).values())):
            if scanned == MAX_SCANNED_CHILDREN:
                break
            # Most children differ in their first token.
            if not node.content.startswith(head) or node.num_pages < self._num_groups:
                continue
            if node.step_id >= before_step:
                continue
            length = _common_length(tokens_of(node.content), tokens_of(content))
            if length > best_length:
                best, best_length = node, length
        return best, best_length

    def clear(self, pool: PagePool) -> None:
        """Forget everything; pages in use stay with their holders."""
        events, self._events = self._events, None
        self.withdraw(list(self._node_of_page), pool)
        self._events = events
        if events is not None:
            events.cleared()

    def _remove(self, node: Node) -> None:
        del self._nodes[node.key]
        siblings = self._children[node.parent]
        del siblings[node.content]
        if not siblings:
            del self._children[node.parent]


def _common_length(left: Sequence[int], right: Sequence[int]) -> int:
    length = min(len(left), len(right))
    for position in range(length):
        if left[position] != right[position]:
            return position
    return length
