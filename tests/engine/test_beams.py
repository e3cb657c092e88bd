"""Does any schedule change a beam search, copy more than it must, or keep a page? Integers only.

Searches run between ordinary requests on the checking runner; what they yield must be what the search alone
yields, and counters say that the prompt ran once and that beams share what they have in common.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
from fake_runner import EOS, LIMITS, Replica, full, hybrid

from slipstream.cache.kv_cache import KvCache
from slipstream.core.cache_group import CacheGroup
from slipstream.core.errors import RequestError
from slipstream.core.plan import StepPlan
from slipstream.core.request import RequestOptions
from slipstream.engine.beams import Beams

GROUPS = {"full": full(), "hybrid": hybrid(20), "window": hybrid(12)[:1]}
PROMPT = list(range(10, 71))


def make(groups: list[CacheGroup] | None = None, **options: object) -> Replica:
    fields: dict[str, object] = {"num_pages": 400, "max_batch_size": 8, "max_num_tokens": 64} | options
    return Replica(groups or full(), **fields)  # type: ignore[arg-type]


def finished(replica: Replica) -> Replica:
    replica.run()
    replica.check_outputs()
    replica.check_idle()
    return replica


@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("width", [1, 2, 5])
def test_alone(groups: list[CacheGroup], depth: int, width: int) -> None:
    replica = make(groups, depth=depth)
    replica.submit("beams", PROMPT, 20, n=width, beam_width=width)
    finished(replica)
    assert len(replica.outputs) == width


def test_the_prompt_runs_once_and_beams_share_it() -> None:
    replica = make(num_pages=400)
    replica.submit("beams", PROMPT, 16, n=1, beam_width=4)
    fewest_free = replica.cache.pool.num_free
    num_steps = 0
    while replica.scheduler.has_work:
        replica.step()
        num_steps += 1
        fewest_free = min(fewest_free, replica.cache.pool.num_free)
    stats = replica.scheduler.stats
    assert num_steps == 16
    # 61 tokens of the prompt, then four beams a step; the last token of each never runs.
    assert stats.executed_tokens == stats.num_planned_tokens == len(PROMPT) + 4 * 15
    # Eight blocks of prompt, its last one begun, and two of output in each of four beams.
    most_used = replica.cache.pool.num_usable - fewest_free
    blocks = 10 + 3 * 3
    assert most_used <= blocks < 4 * 10 / 2
    # Three forks at first; later each step forks as many beams as left.
    assert 3 <= stats.num_copied_blocks <= 3 * 16
    finished(replica)


def test_a_fork_at_a_block_border_copies_nothing() -> None:
    replica = make()
    replica.submit("beams", PROMPT[:56], 2, n=2, beam_width=4)
    finished(replica)
    assert replica.scheduler.stats.num_copied_blocks == 0
    assert replica.scheduler.stats.executed_tokens == 56 + 4


def test_references_of_shared_pages() -> None:
    replica = make()
    replica.submit("beams", PROMPT, 8, n=2, beam_width=3)
    replica.step()
    replica.launch()
    running = replica.scheduler.running()
    assert len(running) == 3
    shared = [sequence.table.pages[0][:7] for sequence in running]
    assert shared[0] == shared[1] == shared[2]
    pool = replica.cache.pool
    assert [pool.references(page) for page in shared[0]] == [3] * 7
    own = [sequence.table.pages[0][7] for sequence in running]
    # The copies read the root's until their step has retired.
    assert len(set(own)) == 3 and sorted(pool.references(page) for page in own) == [1, 1, 3]
    finished(replica)


def test_neighbours_overlap_while_a_search_waits_for_its_tokens() -> None:
    replica = make(depth=2)
    replica.submit("plain", [5, 6, 7], 30)
    replica.submit("beams", PROMPT, 10, n=2, beam_width=3)
    finished(replica)
    assert replica.scheduler.stats.max_outstanding == 2
    # The search sits out every other plan; its neighbour is in all of them.
    assert replica.scheduler.stats.num_plans <= 31


def small_pool(
    groups: list[CacheGroup],
    *,
    width: int,
    factor: float = 1.0,
    lengths: tuple[int, int] = (len(PROMPT), 20),
    **options: object,
) -> Replica:
    """A pool for `factor` searches of `lengths` (prompt, output) at their longest."""
    cache, total = make(groups).cache, sum(lengths)
    needed = cache.pages_for(total, max_span=64) + (width - 1) * cache.pages_of_fork(lengths[0], total)
    return make(groups, num_pages=1 + int(needed * factor), **options)


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
def test_preempted_searches_start_anew_and_end_the_same(groups: list[CacheGroup], depth: int) -> None:
    replica = small_pool(groups, width=4, lengths=(6, 40), depth=depth, max_batch_size=60)
    for i in range(10):
        replica.submit(f"beams {i}", [100 + i, *PROMPT[:5]], 40, n=2, beam_width=4)
        replica.submit(f"plain {i}", [200 + i, *PROMPT[:5]], 40)
    finished(replica)
    assert replica.scheduler.stats.num_preemptions > 0


@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
def test_a_pool_that_just_fits_is_enough_and_less_is_refused(groups: list[CacheGroup]) -> None:
    replica = small_pool(groups, width=4)
    replica.submit("beams", PROMPT, 20, n=2, beam_width=4)
    finished(replica)
    assert replica.scheduler.stats.num_preemptions == 0
    replica = small_pool(groups, width=4, factor=0.9)
    with pytest.raises(RequestError, match=r"20 to generate in 4 beams.*KvCacheConfig") as caught:
        replica.submit("beams", PROMPT, 20, n=2, beam_width=4)
    assert caught.value.code == "context_length_exceeded"


@pytest.mark.parametrize("policy", ["GUARANTEED_NO_EVICT", "STATIC_BATCH"])
@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
def test_counted_at_its_longest_nothing_is_preempted(groups: list[CacheGroup], policy: str) -> None:
    replica = small_pool(groups, width=4, factor=1.6, policy=policy, max_batch_size=16)
    for i in range(4):
        replica.submit(f"beams {i}", [100 + i, *PROMPT[1:]], 20, n=2, beam_width=2 + i % 3)
        replica.submit(f"plain {i}", [200 + i, *PROMPT[1:]], 20)
    finished(replica)
    assert replica.scheduler.stats.num_preemptions == 0


def test_a_search_waits_for_all_its_rows() -> None:
    replica = make(max_batch_size=5)
    replica.submit("plain", PROMPT[:9], 12)
    replica.submit("other", PROMPT[1:9], 12)
    replica.submit("beams", PROMPT, 8, n=2, beam_width=4)
    replica.submit("late", PROMPT[:5], 3)
    for _ in range(10):
        replica.step()
    assert replica.scheduler.num_running == 2
    finished(replica)
    with pytest.raises(RequestError, match=r"beam_width=6 .* the engine has 5.*max_batch_size"):
        replica.submit("wide", PROMPT, 8, n=2, beam_width=6)


@pytest.mark.parametrize("num_steps", [0, 1, 2, 3, 9])
@pytest.mark.parametrize("depth", [1, 2])
def test_an_abort_ends_all_of_it_at_any_moment(num_steps: int, depth: int) -> None:
    replica = make(depth=depth)
    replica.submit("kept", PROMPT[:20], 20)
    replica.submit("beams", PROMPT, 20, n=3, beam_width=4)
    for _ in range(num_steps):
        replica.step()
    replica.abort("beams")
    replica.abort("beams")
    assert [replica.reasons["beams", i] for i in range(3)] == ["cancelled"] * 3
    best = [replica.outputs["beams", i] for i in range(3)]
    # The prompt takes two steps beside its neighbour's; the second is the first to bring candidates.
    assert all(best) == (num_steps > depth), best
    finished(replica)


def test_a_deadline_ends_it_with_what_it_has() -> None:
    replica = make()
    options = RequestOptions(timeout_s=5.0)
    replica.submit("beams", PROMPT, 20, n=2, beam_width=3, options=options)
    for _ in range(6):
        replica.step()
    replica.expire(4.0)
    assert not replica.reasons
    replica.expire(6.0)
    assert {replica.reasons["beams", i] for i in range(2)} == {"timeout"}
    assert all(replica.outputs["beams", i] for i in range(2))
    finished(replica)


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("position", [3, 60, 64])
def test_bad_numbers_in_one_beam_fail_the_request_alone(position: int, depth: int) -> None:
    replica = make(depth=depth)
    replica.submit("kept", PROMPT[:20], 20)
    replica.submit("beams", PROMPT, 20, n=2, beam_width=3)
    replica.runner.nan_at["beams", 0] = position
    finished(replica)
    assert [replica.reasons["beams", i] for i in range(2)] == ["error"] * 2
    assert replica.reasons["kept", 0] == "length"


def traffic(seed: int, groups: list[CacheGroup], depth: int) -> Replica:
    """Searches and plain requests over shared prefixes, in a pool of any size, aborted at any moment."""
    rng = random.Random(seed)
    probe = make(groups)
    needed = probe.cache.pages_for(80, max_span=32) + 3 * probe.cache.pages_of_fork(50, 80)
    replica = make(
        groups,
        num_pages=1 + int(needed * rng.choice([1, 1, 1.2, 3])),
        depth=depth,
        max_batch_size=rng.choice([4, 24, 32]),
        max_num_tokens=32,
        enable_partial_reuse=rng.random() < 0.5,
    )
    prefixes = [[rng.randrange(2, 4) for _ in range(rng.randrange(1, 50))] for _ in range(3)]
    names: list[str] = []
    for _ in range(3000):
        if len(names) < 14 and rng.random() < 0.6:
            names.append(f"r{len(names)}")
            prompt = [*rng.choice(prefixes), *(rng.randrange(2, 4) for _ in range(rng.randrange(1, 10)))]
            width = rng.choice([None, 1, 2, 3, 4])
            n = rng.randrange(1, (width or 2) + 1)
            replica.submit(names[-1], prompt, rng.randrange(1, 20), n=n, beam_width=width)
        if names and rng.random() < 0.01:
            replica.abort(rng.choice(names))
        if rng.random() < 0.7 or not replica.scheduler.num_outstanding:
            replica.step()
        else:
            replica.commit()
        if len(names) == 14 and not replica.scheduler.has_work:
            replica.check_outputs()
            replica.check_idle()
            return replica
    raise AssertionError("not done after 3,000 steps")


@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_random_traffic(groups: list[CacheGroup], depth: int) -> None:
    replicas = [traffic(seed, groups, depth) for seed in range(6)]
    stats = [replica.scheduler.stats for replica in replicas]
    assert sum(one.num_preemptions for one in stats) > 0
    assert sum(one.num_copied_blocks for one in stats) > 0
    outputs = [(r.requests[key], ids) for r in replicas for key, ids in r.outputs.items()]
    assert sum(EOS in ids for request, ids in outputs if request.beams) > 10
    for replica in replicas:
        replica.check_reusable()


def test_limits_bound_the_width() -> None:
    replica = make()
    with pytest.raises(
        RequestError, match=f"beam_width must be an integer from 1 to {LIMITS.max_beam_width}"
    ):
        replica.submit("beams", PROMPT, 8, beam_width=LIMITS.max_beam_width + 1)


def copy_nothing(patch: pytest.MonkeyPatch) -> None:
    """A fork writes on into a page that nobody filled for it."""
    fork = KvCache.fork

    def fork_empty(cache: KvCache, *args: Any, **options: Any) -> Any:
        copies = fork(cache, *args, **options)
        return copies and []

    patch.setattr(KvCache, "fork", fork_empty)


def share_without_counting(patch: pytest.MonkeyPatch) -> None:
    """The first beam to leave takes shared blocks with it."""
    fork = KvCache.fork

    def fork_uncounted(cache: KvCache, table: Any, *args: Any, **options: Any) -> Any:
        copies = fork(cache, table, *args, **options)
        cache.pool.release(table.pages[0][: table.num_reused], after_step=-1)
        return copies

    patch.setattr(KvCache, "fork", fork_uncounted)


def keep_sampled_tokens(patch: pytest.MonkeyPatch) -> None:
    """A beam goes on with what was sampled, not with what the search picked."""
    plan = Beams.plan

    def plan_without_tokens(beams: Beams, step: StepPlan, *args: Any) -> int:
        num_copies = plan(beams, step, *args)
        step.tokens.clear()
        return num_copies

    patch.setattr(Beams, "plan", plan_without_tokens)


@pytest.mark.parametrize("mutate", [copy_nothing, share_without_counting, keep_sampled_tokens])
def test_the_harness_notices(mutate: Callable[[pytest.MonkeyPatch], None], monkeypatch: Any) -> None:
    mutate(monkeypatch)

    def run_all() -> None:
        for seed in range(6):
            traffic(seed, full(), 2)

    with pytest.raises((AssertionError, KeyError)):
        run_all()
