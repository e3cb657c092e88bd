"""Which pages are free, and when may one be used again?

Invariant: a page is in exactly one place: held (references > 0), retiring (its last references fall when a
step retires), or free (blank, or still holding reusable content in the order of its eviction). A page that
some outstanding step or transfer names is never handed out. Page 0 is the null page: all zeros, never handed
out, never written.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence

from slipstream.cache.eviction_order import EvictionOrder

NULL_PAGE = 0


class PagePool:
    """Reference counts and free lists of `num_pages` equal pages, page 0 included.

    `on_evict(page)` is called when a free page that still holds reusable content is taken for new content.
    `clock` tells seconds, for priorities that expire.
    """

    def __init__(
        self,
        num_pages: int,
        *,
        on_evict: Callable[[int], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        assert num_pages >= 2
        self.num_pages = num_pages
        self._on_evict = on_evict
        self._references = [0] * num_pages
        self._blank: list[int] = list(range(num_pages - 1, NULL_PAGE, -1))
        self._reusable = EvictionOrder(clock)
        # (priority, seconds until it expires or None) of pages whose content has another than the default.
        self._retention: dict[int, tuple[int, float | None]] = {}
        self._is_keyed = bytearray(num_pages)
        self._is_tainted = bytearray(num_pages)
        self._retiring: deque[tuple[int, list[int]]] = deque()
        self._num_retiring = 0
        self._last_retired = -1
        self._num_returned = 0

    @property
    def num_usable(self) -> int:
        """Pages that requests can ever hold."""
        return self.num_pages - 1

    @property
    def num_free(self) -> int:
        return len(self._blank) + len(self._reusable)

    @property
    def num_retiring(self) -> int:
        """References that fall when outstanding steps retire: an upper bound of the pages they free."""
        return self._num_retiring

    @property
    def num_returned(self) -> int:
        """How often a page has become free, since the start: whether any did since an earlier look."""
        return self._num_returned

    @property
    def last_retired(self) -> int:
        """The latest step known to touch no page any more."""
        return self._last_retired

    def references(self, page: int) -> int:
        return self._references[page]

    def allocate(self, count: int) -> list[int] | None:
        """Take `count` pages with one reference each, blank ones first; None if there are not enough."""
        if count > self.num_free:
            return None
        pages: list[int] = []
        for _ in range(count):
            if self._blank:
                page = self._blank.pop()
            else:
                page = self._reusable.pop()
                self._is_keyed[page] = 0
                self._retention.pop(page, None)
                self._on_evict(page)
            self._references[page] = 1
            pages.append(page)
        return pages

    def acquire(self, *held: Sequence[int]) -> None:
        """Add a reference to pages that hold reusable content, taking them off the free list."""
        references, remove = self._references, self._reusable.remove
        for pages in held:
            for page in pages:
                if page == NULL_PAGE:
                    continue
                if references[page] == 0:
                    remove(page)
                references[page] += 1

    def count_idle(self, *held: Sequence[int]) -> int:
        """Return how many of these pages, each counted once, nobody holds."""
        references = self._references
        idle = {page for pages in held for page in pages if not references[page]}
        return len(idle - {NULL_PAGE})

    def release(self, pages: Iterable[int], *, after_step: int) -> None:
        """Drop one reference to each page once step `after_step` has retired (at once if it has)."""
        held = [page for page in pages if page > NULL_PAGE]
        if not held:
            return
        if after_step <= self._last_retired:
            self._drop(held)
        else:
            self._retiring.append((after_step, held))
            self._num_retiring += len(held)

    def retire(self, step_id: int) -> None:
        """Note that step `step_id`, and so every earlier one, no longer touches any page."""
        self._last_retired = max(self._last_retired, step_id)
        if not self._retiring:
            return
        waiting: deque[tuple[int, list[int]]] = deque()
        for after_step, pages in self._retiring:
            if after_step <= self._last_retired:
                self._num_retiring -= len(pages)
                self._drop(pages)
            else:
                waiting.append((after_step, pages))
        self._retiring = waiting

    def set_keyed(self, page: int, is_keyed: bool) -> None:
        """Say whether a page's content can be found by the prefix index (and so is worth keeping)."""
        self._is_keyed[page] = is_keyed
        if not is_keyed and self._references[page] == 0 and page in self._reusable:
            self._reusable.remove(page)
            self._give_blank(page)

    def set_retention(self, page: int, priority: int, duration_s: float | None) -> None:
        """Say how long the content of a held page is worth keeping once it is free."""
        assert self._references[page] > 0, f"page {page} is free"
        self._retention[page] = (priority, duration_s)

    def taint(self, page: int) -> None:
        """Mark a page whose content may be NaN: it must be zeroed before its next use."""
        self._is_tainted[page] = 1

    def take_tainted(self, pages: Iterable[int]) -> list[int]:
        """Return those of `pages` that must be zeroed now, and clear their mark."""
        tainted = [page for page in pages if self._is_tainted[page]]
        for page in tainted:
            self._is_tainted[page] = 0
        return tainted

    def _drop(self, pages: Iterable[int]) -> None:
        """Take back a reference to each page; a long request gives back many at its end: keep it flat."""
        references, is_keyed, retention = self._references, self._is_keyed, self._retention
        add = self._reusable.add
        for page in pages:
            count = references[page] - 1
            assert count >= 0, f"page {page} freed twice"
            references[page] = count
            if count:
                continue
            self._num_returned += 1
            if not is_keyed[page]:
                self._give_blank(page)
            elif page in retention:
                add(page, *retention[page])
            else:
                add(page)

    def _give_blank(self, page: int) -> None:
        self._retention.pop(page, None)
        self._blank.append(page)

    def check(self) -> None:
        """Assert that no page is lost, free twice, or both held and free. For tests; O(pages)."""
        free = [*self._blank, *self._reusable]
        assert len(free) == len(set(free)), "a page is free twice"
        assert NULL_PAGE not in free, "the null page is free"
        held = {page for page in range(1, self.num_pages) if self._references[page] > 0}
        assert held.isdisjoint(free), "a held page is free"
        assert len(held) + len(free) == self.num_usable, "a page leaked"
