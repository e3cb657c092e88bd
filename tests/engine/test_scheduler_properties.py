"""Does any schedule change an output, lose a page or use one too early? Random traffic, each step checked.

A scenario is a function of its seed: shared prefixes, n > 1, salts, scripted ends, aborts at any moment, and
pools so small that rows are preempted. The fake runner checks every slot that is read; here the outputs are
compared with those of each request alone, and the books must balance at the end.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import Any

import pytest
from fake_runner import Replica, full, hybrid

from slipstream.cache.kv_cache import KvCache
from slipstream.cache.pool import PagePool
from slipstream.cache.prefix_index import PrefixIndex
from slipstream.cache.promises import Promises
from slipstream.core.cache_group import CacheGroup

NUM_REQUESTS = 14
MAX_PROMPT = 60
MAX_TOKENS = 24


@dataclasses.dataclass(frozen=True)
class Setup:
    """One corner of the grid."""

    groups: list[CacheGroup]
    block_tokens: int = 8
    depth: int = 1
    reuse: bool = True
    partial: bool = True
    chunked: bool = True
    policy: str = "MAX_UTILIZATION"
    chunking: str = "FIRST_COME_FIRST_SERVED"


SETUPS = {
    "full": Setup(full()),
    "full-overlap": Setup(full(), depth=2, block_tokens=16),
    "full-deep": Setup(full(), depth=3),
    "full-equal": Setup(full(), depth=2, chunking="EQUAL_PROGRESS"),
    "full-block-32": Setup(full(), depth=2, block_tokens=32),
    "full-no-reuse": Setup(full(), depth=2, reuse=False),
    "full-no-partial": Setup(full(), depth=2, partial=False),
    "full-whole-prompts": Setup(full(), depth=2, chunked=False),
    "hybrid": Setup(hybrid(20)),
    "hybrid-overlap": Setup(hybrid(20), depth=2),
    "hybrid-deep": Setup(hybrid(9), depth=3),
    "hybrid-block-16": Setup(hybrid(33), depth=2, block_tokens=16),
    "hybrid-no-reuse": Setup(hybrid(20), depth=2, reuse=False),
    "hybrid-equal": Setup(hybrid(20), depth=2, chunking="EQUAL_PROGRESS"),
    "hybrid-no-partial": Setup(hybrid(20), depth=3, partial=False),
    "window-only": Setup(hybrid(12)[:1], depth=2),
}


class Traffic:
    """Random requests over a few prefixes, submitted and aborted between steps."""

    def __init__(
        self, setup: Setup, seed: int, *, nan_rate: float = 0.0, event_buffer_max_size: int = 0
    ) -> None:
        rng = self.rng = random.Random(seed)
        max_num_tokens = rng.choice([13, 21, 64])
        longest = MAX_PROMPT + MAX_TOKENS
        if not setup.chunked:
            max_num_tokens = MAX_PROMPT + 4
        replica = Replica(setup.groups, num_pages=1000, block_tokens=setup.block_tokens)
        needed = replica.cache.pages_for(longest, max_span=max_num_tokens)
        self.replica = Replica(
            setup.groups,
            num_pages=1 + int(needed * rng.choice([1, 1.2, 2, 4])),
            block_tokens=setup.block_tokens,
            depth=setup.depth,
            max_batch_size=rng.choice([2, 5, 8, 40]),
            max_num_tokens=max_num_tokens,
            enable_block_reuse=setup.reuse,
            enable_partial_reuse=setup.partial,
            enable_chunked_prefill=setup.chunked,
            policy=setup.policy,
            chunking_policy=setup.chunking,
            event_buffer_max_size=event_buffer_max_size,
        )
        self.prefixes = [self._tokens(rng.randrange(1, 50)) for _ in range(3)]
        self.num_submitted = 0
        self.nan_rate = nan_rate

    def _tokens(self, count: int) -> list[int]:
        # Two tokens only: blocks then often share a start, which is what partial reuse feeds on.
        return [self.rng.randrange(2, 4) for _ in range(count)]

    def submit(self) -> None:
        rng = self.rng
        prompt = list(rng.choice(self.prefixes))
        name = f"r{self.num_submitted}"
        prompt = (prompt + self._tokens(rng.randrange(0, 20)))[: rng.choice([MAX_PROMPT, 16, 24])]
        if rng.random() < self.nan_rate:
            self.replica.runner.nan_at[name, 0] = rng.randrange(len(prompt) + 8)
        self.replica.submit(
            name,
            prompt,
            rng.randrange(1, MAX_TOKENS + 1),
            n=rng.choice([1, 1, 1, 4]),
            salt=rng.choice([None, None, "other"]),
            end=rng.choice([None, None, rng.randrange(MAX_TOKENS)]),
        )
        self.num_submitted += 1

    def abort(self) -> None:
        index = self.rng.choice([None, 0, 3])
        self.replica.abort(f"r{self.rng.randrange(self.num_submitted + 1)}", index)

    def run(self, abort_rate: float) -> None:
        rng, replica = self.rng, self.replica
        launch_rate = rng.choice([0.5, 0.7, 1.0])
        for _ in range(20_000):
            if self.num_submitted < NUM_REQUESTS and rng.random() < 0.3:
                self.submit()
            if rng.random() < abort_rate:
                self.abort()
            # Commits come at any moment: up to `depth` plans are outstanding, sometimes fewer.
            if rng.random() < launch_rate or not replica.scheduler.num_outstanding:
                replica.step()
            else:
                replica.commit()
            if self.num_submitted == NUM_REQUESTS and not replica.scheduler.has_work:
                return
        raise AssertionError("not done after 20,000 steps")


def run_traffic(setup: Setup, *, abort_rate: float = 0.02) -> dict[str, int]:
    """Run and check eight scenarios; returns what the schedulers counted."""
    totals: dict[str, int] = {}
    for seed in range(8):
        traffic = Traffic(setup, seed)
        traffic.run(abort_rate)
        traffic.replica.check_outputs()
        traffic.replica.check_idle()
        for stat, value in dataclasses.asdict(traffic.replica.scheduler.stats).items():
            before = totals.get(stat, 0)
            totals[stat] = max(value, before) if stat == "max_outstanding" else value + before
        traffic.replica.check_reusable()
    return totals


@pytest.mark.parametrize("name", SETUPS)
def test_outputs_and_books_survive_random_traffic(name: str) -> None:
    setup = SETUPS[name]
    totals = run_traffic(setup)
    # The scenarios did what they are here for.
    assert totals["num_plans"] > 500 and totals["num_preemptions"] > 0
    assert totals["max_outstanding"] == setup.depth
    assert (totals["num_cached_tokens"] > 0) == setup.reuse
    # Chunks of a prompt leave no tokens for others, so those who park wait for a tail that they will copy.
    assert (totals["num_parked"] > 0) == (setup.reuse and setup.partial)
    assert (totals["num_copied_blocks"] > 0) == (setup.reuse and setup.partial)
    if setup.chunked:
        assert totals["num_chunks"] > totals["num_admissions"]


def release_at_once(patch: pytest.MonkeyPatch) -> None:
    """Pages go back while outstanding steps still name them."""
    release = PagePool.release
    patch.setattr(PagePool, "release", lambda pool, pages, *, after_step: release(pool, pages, after_step=-1))


def publish_one_block_too_many(patch: pytest.MonkeyPatch) -> None:
    """A block can be found before its computing step is planned."""
    publish = KvCache.publish

    def publish_early(cache: KvCache, table: Any, tokens: Any, num_planned: int, *, step_id: int) -> Any:
        held = min(num_planned + cache.block_tokens, table.capacity)
        return publish(cache, table, tokens, held, step_id=step_id)

    patch.setattr(KvCache, "publish", publish_early)


def copy_within_a_plan(patch: pytest.MonkeyPatch) -> None:
    """A block is copied in the step that writes it, though copies run ahead of the forward."""
    lookup = KvCache.lookup
    patch.setattr(
        KvCache,
        "lookup",
        lambda cache, table, tokens, *, step_id: lookup(cache, table, tokens, step_id=step_id + 1),
    )


def trim_one_token_too_early(patch: pytest.MonkeyPatch) -> None:
    """A window loses a block that its next query still sees."""
    trim = KvCache.trim

    def trim_early(cache: KvCache, table: Any, next_position: int, *, after_step: int) -> None:
        trim(cache, table, next_position + cache.block_tokens, after_step=after_step)

    patch.setattr(KvCache, "trim", trim_early)


def forget_to_evict(patch: pytest.MonkeyPatch) -> None:
    """The index still finds a page whose content is gone."""
    patch.setattr(PrefixIndex, "forget_page", lambda index, page: None)


def lose_waiters(patch: pytest.MonkeyPatch) -> None:
    """Who parked on a promise that was kept is not woken."""
    end = Promises.end
    patch.setattr(Promises, "end", lambda promises, keys: end(promises, keys)[1:])


def keep_promises(patch: pytest.MonkeyPatch) -> None:
    """A promise outlives its owner, so that whoever comes next waits for nobody."""
    end = Promises.end

    def end_and_promise_again(promises: Promises[Any], keys: Any) -> Any:
        freed = end(promises, keys)
        promises.add(keys)
        return freed

    patch.setattr(Promises, "end", end_and_promise_again)


MUTATIONS = {
    "full": [lose_waiters, keep_promises],
    "full-overlap": [release_at_once, copy_within_a_plan, forget_to_evict],
    "full-deep": [publish_one_block_too_many],
    "hybrid-deep": [release_at_once, trim_one_token_too_early],
}


@pytest.mark.parametrize(("name", "mutate"), [(name, m) for name, row in MUTATIONS.items() for m in row])
def test_harness_notices_a_broken_cache(
    name: str, mutate: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    mutate(monkeypatch)
    with pytest.raises((AssertionError, KeyError)):
        run_traffic(SETUPS[name], abort_rate=0.2)
