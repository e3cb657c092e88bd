"""Do options of the scheduler and the cache reach a real engine through `LLM`, and do what they say there?"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from slipstream import (
    LLM,
    KvCacheConfig,
    KvCacheRetentionConfig,
    RequestError,
    SamplingParams,
    SchedulerConfig,
    TokenRangeRetentionConfig,
)
from slipstream.core.errors import ConfigError
from slipstream.core.plan import StepPlan
from tests.cache.router import Router, index_of
from tests.engine.tiny import prompt_ids, tiny_gemma3, write_folder

PROMPTS = [prompt_ids(10 + 7 * i, seed=i) for i in range(8)]
GREEDY = SamplingParams(max_tokens=24, ignore_eos=True)
# Little more than the longest request (83 tokens).
SMALL_POOL = KvCacheConfig(max_tokens=96, tokens_per_block=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tiny_gemma3(), tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def alone(folder: Path) -> list[list[int]]:
    with LLM(folder) as llm:
        return [llm.generate(prompt, GREEDY).outputs[0].token_ids for prompt in PROMPTS]


@pytest.fixture
def llm(folder: Path) -> Iterator[LLM]:
    with LLM(folder, max_batch_size=1) as llm:
        yield llm


@pytest.mark.parametrize("policy", ["MAX_UTILIZATION", "GUARANTEED_NO_EVICT", "STATIC_BATCH"])
def test_policies_change_the_schedule_and_not_the_tokens(
    folder: Path, alone: list[list[int]], policy: str
) -> None:
    config = SchedulerConfig(capacity_scheduler_policy=policy)
    with LLM(
        folder,
        scheduler_config=config,
        kv_cache_config=SMALL_POOL,
        max_num_tokens=32,
        max_batch_size=8,
        disable_overlap_scheduler=False,
    ) as llm:
        outputs = llm.generate(PROMPTS, GREEDY, raise_on_error=True)
        stats = llm.get_stats()
    assert [output.outputs[0].token_ids for output in outputs] == alone
    assert (stats["num_preemptions"] > 0) == (policy == "MAX_UTILIZATION")
    assert stats["num_free_pages"] == stats["num_pages"]


def test_an_urgent_request_overtakes(llm: LLM) -> None:
    runner = llm.startup.engine.runner
    launch, is_running, may_go_on = runner.launch, threading.Event(), threading.Event()

    def launch_when_told(plan: StepPlan) -> Any:
        is_running.set()
        assert may_go_on.wait(60)
        return launch(plan)

    runner.launch = launch_when_told
    first = llm.generate_async(PROMPTS[0], GREEDY)
    assert is_running.wait(60)
    waiting = llm.generate_async(PROMPTS[1], GREEDY)
    urgent = llm.generate_async(PROMPTS[2], SamplingParams(max_tokens=2, priority=-1, ignore_eos=True))
    may_go_on.set()
    ends = [output.result(60).metrics.finished_s for output in (first, urgent, waiting)]
    assert ends == sorted(ends)


def test_a_request_out_of_time_ends_with_what_it_has(llm: LLM) -> None:
    endless = SamplingParams(max_tokens=None, ignore_eos=True)
    # A step takes a while, so that few tokens come in time, and the first of them does on a busy machine too.
    runner = llm.startup.engine.runner
    launch = runner.launch
    runner.launch = lambda plan: (time.sleep(0.05), launch(plan))[1]
    running = llm.generate_async(PROMPTS[0], endless, timeout_s=1.5)
    waiting = llm.generate_async(PROMPTS[1], GREEDY, timeout_s=1.5)
    other = llm.generate_async(PROMPTS[2], SamplingParams(max_tokens=4, ignore_eos=True))
    cut, never_ran = running.result(60).outputs[0], waiting.result(60)
    assert cut.finish_reason == never_ran.outputs[0].finish_reason == "timeout"
    assert 0 < len(cut.token_ids) <= 30 and never_ran.outputs[0].token_ids == []
    assert never_ran.error is None and never_ran.finished
    assert other.result(60).outputs[0].finish_reason == "length"
    stats = llm.get_stats()
    assert stats["num_free_pages"] == stats["num_pages"] and stats["num_running"] == stats["num_waiting"] == 0


def test_a_timeout_of_a_list_cuts_each_prompt_and_loses_none(llm: LLM) -> None:
    runner = llm.startup.engine.runner
    launch = runner.launch
    runner.launch = lambda plan: (time.sleep(0.01), launch(plan))[1]
    outputs = llm.generate(PROMPTS[:3], SamplingParams(max_tokens=None, ignore_eos=True), timeout_s=0.25)
    assert [output.outputs[0].finish_reason for output in outputs] == ["timeout"] * 3
    assert llm.chat([{"role": "user", "content": "hi"}], GREEDY, timeout_s=60).error is None


def test_a_timeout_out_of_bounds_is_refused(llm: LLM) -> None:
    with pytest.raises(RequestError, match="timeout_s must be above 0"):
        llm.generate_async(PROMPTS[0], GREEDY, timeout_s=0)
    assert llm.generate(PROMPTS[0], GREEDY, timeout_s=-1).error.param == "timeout_s"


ONE = SamplingParams(max_tokens=1, ignore_eos=True)


def test_a_prompt_worth_keeping_outlives_a_flood(folder: Path) -> None:
    """Prompts of 40 tokens pass through a cache of 96; only the retained one is still there afterwards."""
    kept = KvCacheRetentionConfig(
        token_range_retention_configs=[TokenRangeRetentionConfig(token_start=0, priority=90)],
        decode_retention_priority=0,
    )
    prompt = prompt_ids(40, seed=70)
    cached = []
    for config in (kept, None):
        with LLM(folder, kv_cache_config=SMALL_POOL) as llm:
            llm.generate(prompt, ONE, kv_cache_retention_config=config)
            for i in range(6):
                llm.generate(prompt_ids(40, seed=80 + i), ONE)
            cached.append(llm.generate(prompt, ONE).num_cached_tokens)
    assert cached == [39, 0]


def test_a_retention_of_another_kind_is_that_prompts_error(llm: LLM) -> None:
    output = llm.generate(PROMPTS[0], ONE, kv_cache_retention_config={"decode_retention_priority": 3})
    assert output.error is not None and output.error.param == "kv_cache_retention_config"


def test_events_replay_as_the_index(folder: Path) -> None:
    config = KvCacheConfig(max_tokens=96, tokens_per_block=8, event_buffer_max_size=10_000)
    with LLM(folder, kv_cache_config=config) as llm:
        router, cache = Router(), llm.startup.engine.scheduler.cache
        for i in range(3):
            if i == 1:
                llm.reset_prefix_cache()
            llm.generate(PROMPTS[:5], SamplingParams(max_tokens=12, ignore_eos=True))
            router.apply(llm.get_kv_cache_events())
            assert len(router.blocks) > 10 and router.blocks == index_of(cache)


def test_events_that_are_off_are_refused_with_the_option(llm: LLM) -> None:
    with pytest.raises(ConfigError, match="event_buffer_max_size"):
        llm.get_kv_cache_events()
    assert llm.generate(PROMPTS[0], ONE).error is None


@pytest.mark.parametrize("size", [-1, 1.5, True, None, "many", 2**40])
def test_a_buffer_size_out_of_bounds_is_refused(size: object) -> None:
    with pytest.raises(ConfigError, match="event_buffer_max_size"):
        KvCacheConfig(event_buffer_max_size=size)
