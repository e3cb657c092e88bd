"""May the head of the queue start now? One class per capacity policy, over page counts only.

MAX_UTILIZATION admits what fits now and leaves running out of pages to preemption. GUARANTEED_NO_EVICT counts
every running request at its longest, so nothing is ever preempted. STATIC_BATCH admits a batch, counted the
same way, and the next one when all of it has ended.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from slipstream.cache.kv_cache import Hit, KvCache
from slipstream.core.errors import RequestError
from slipstream.core.registry import Registry
from slipstream.core.request import Request
from slipstream.engine.row_allocation import RowAllocation
from slipstream.engine.sequence import Sequence

POLICIES = Registry(
    "capacity scheduler policy",
    {
        "MAX_UTILIZATION": "slipstream.engine.admission:MaxUtilization",
        "GUARANTEED_NO_EVICT": "slipstream.engine.admission:GuaranteedNoEvict",
        "STATIC_BATCH": "slipstream.engine.admission:StaticBatch",
    },
)


class MaxUtilization:
    """Admit where all known tokens fit beside what the running prompts still need."""

    def __init__(
        self, cache: KvCache, rows: RowAllocation, *, max_num_tokens: int, enable_chunked_prefill: bool
    ) -> None:
        self._cache = cache
        self._rows = rows
        self._max_num_tokens = max_num_tokens
        self._enable_chunked_prefill = enable_chunked_prefill
        self._refused: tuple[Sequence, int] | None = None

    def check_fits(self, request: Request) -> None:
        """Raise RequestError where a request could never run, whatever else does."""
        num_prompt = len(request.prompt_token_ids)
        total = num_prompt + request.max_tokens
        needed = self._cache.pages_for(total, max_span=self._max_num_tokens)
        width = 1 if request.beams is None else request.beams.width
        needed += (width - 1) * self._cache.pages_of_fork(num_prompt, total)
        usable = self._cache.pool.num_usable
        if needed > usable:
            beams = f" in {width} beams" if width > 1 else ""
            raise RequestError(
                f"The request needs {needed} cache pages ({num_prompt} prompt tokens + {request.max_tokens} "
                f"to generate{beams}), the cache has {usable}; shorten it, lower max_tokens, or start the "
                "engine with a larger KvCacheConfig(max_tokens=...).",
                param="max_tokens",
                code="context_length_exceeded",
            )
        if width > self._rows.num_rows:
            raise RequestError(
                f"beam_width={width} needs as many rows and the engine has {self._rows.num_rows}; lower it "
                "or raise max_batch_size.",
                param="beam_width",
            )
        if not self._enable_chunked_prefill and num_prompt > self._max_num_tokens:
            raise RequestError(
                f"The prompt has {num_prompt} tokens and a step runs at most {self._max_num_tokens} while "
                "chunked prefill is off; raise max_num_tokens or leave enable_chunked_prefill on.",
                param="prompt",
                code="context_length_exceeded",
            )

    def begin_plan(self) -> None:
        """Note that a new plan is made; running sequences are those of earlier plans."""

    def may_look(self, sequence: Sequence) -> bool:
        """Say whether looking at the head is worth it: not if it was refused and no page came back since."""
        if self._refused is None or self._refused[0] is not sequence:
            return True
        return self._cache.pool.num_returned > self._refused[1] or not len(self._rows)

    def refuse(self, sequence: Sequence) -> None:
        self._refused = (sequence, self._cache.pool.num_returned)

    def choose(self, sequence: Sequence, hit: Hit) -> Hit | None:
        """Return as much of a hit as a sequence can be admitted with, None if it must wait."""
        chosen = next(
            (option for option in self._options(sequence, hit) if self._has_room(sequence, option)), None
        )
        if chosen is None:
            self.refuse(sequence)
        return chosen

    def _options(self, sequence: Sequence, hit: Hit) -> Iterator[Hit]:
        """Yield a hit, then what is left of it where its pages would not fit beside the new ones."""
        yield hit
        if hit.partial is not None:
            yield dataclasses.replace(hit, partial=None, partial_len=0)
        if hit.nodes and not len(self._rows):
            yield self._cache.no_hit(sequence.table, sequence.tokens)

    def _has_room(self, sequence: Sequence, hit: Hit) -> bool:
        wanted = self._pages_wanted(sequence, hit) + self._pages_reserved()
        return wanted <= self._cache.pool.num_free - self._cache.num_idle(hit)

    def _pages_wanted(self, sequence: Sequence, hit: Hit) -> int:
        pages = self._cache.pages_missing(hit, len(sequence.tokens), max_span=self._max_num_tokens)
        return pages + (sequence.num_rows - 1) * len(self._cache.groups)

    def _pages_reserved(self) -> int:
        """Return what the prompts that run still need, and a little for the rows that decode."""
        cache = self._cache
        missing = [other.prefill_end - other.table.capacity for other in self._rows.prefilling]
        blocks = sum(max(0, -(-tokens // cache.block_tokens)) for tokens in missing)
        return (blocks - (-len(self._rows.decoding) // 8)) * len(cache.groups)


class GuaranteedNoEvict(MaxUtilization):
    """Admit where every running request fits at its longest, so that none is ever preempted."""

    def _pages_wanted(self, sequence: Sequence, hit: Hit) -> int:
        pages = self._cache.pages_missing(hit, sequence.max_len, max_span=self._max_num_tokens)
        forks = sequence.num_rows - 1
        return pages + forks * self._cache.pages_of_fork(sequence.num_prompt, sequence.max_len)

    def _pages_reserved(self) -> int:
        cache, running = self._cache, self._rows.running()
        reserved = sum(
            cache.pages_ahead(other.table, other.max_len, max_span=self._max_num_tokens) for other in running
        )
        for group in {other.group for other in running} - {None}:
            assert group is not None
            at = max(group.root.num_prompt, group.beams[0].num_scheduled)
            forks = group.width - len(group.placed)
            reserved += forks * cache.pages_of_fork(at, group.root.max_len)
        return reserved


class StaticBatch(GuaranteedNoEvict):
    """Admit only into an empty engine; the batch then runs to its end."""

    def __init__(
        self, cache: KvCache, rows: RowAllocation, *, max_num_tokens: int, enable_chunked_prefill: bool
    ) -> None:
        super().__init__(
            cache, rows, max_num_tokens=max_num_tokens, enable_chunked_prefill=enable_chunked_prefill
        )
        self._is_open = True

    def begin_plan(self) -> None:
        self._is_open = not len(self._rows)

    def may_look(self, sequence: Sequence) -> bool:
        return self._is_open and super().may_look(sequence)
