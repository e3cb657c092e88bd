"""What may a caller do to a running LLM? Look at it, forget prefixes, put it to sleep, change its weights."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from slipstream import LLM, AsyncLLM, KvCacheConfig, SamplingParams
from slipstream.core.errors import CheckpointError, ConfigError, EngineError
from tests.engine.tiny import prompt_ids, tiny_llama, write_folder

DEADLINE_S = 60.0
OPTIONS: dict[str, Any] = {"device": "cpu", "dtype": "float32", "max_seq_len": 256}
GREEDY = SamplingParams(max_tokens=16, ignore_eos=True)
PROMPTS = [prompt_ids(70, seed=1), prompt_ids(40, seed=2)]
MIB = 2**20


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two models of one configuration."""
    twins = (tiny_llama(seed=2), tiny_llama(seed=9))
    first, second = (write_folder(twin, tmp_path_factory.mktemp("model")) for twin in twins)
    return first, second


@pytest.fixture
def llm(folders: tuple[Path, Path]) -> Iterator[LLM]:
    with LLM(folders[0], **OPTIONS) as llm:
        yield llm


def tokens(llm: LLM) -> list[list[int]]:
    outputs = llm.generate(PROMPTS, GREEDY)
    assert all(output.error is None for output in outputs)
    return [output.outputs[0].token_ids for output in outputs]


@pytest.fixture(scope="module")
def expected(folders: tuple[Path, Path]) -> list[list[list[int]]]:
    found = []
    for folder in folders:
        with LLM(folder, **OPTIONS) as llm:
            found.append(tokens(llm))
    assert found[0][0] != found[1][0] and found[0][1] != found[1][1]
    return found


def test_stats_are_of_one_moment(llm: LLM) -> None:
    """While a request runs, each snapshot is one between two steps: its counters agree with each other."""
    generation = llm.generate_async(PROMPTS[0], SamplingParams(max_tokens=150, ignore_eos=True))
    snapshots = [llm.get_stats() for _ in range(20)]
    assert any(stats["num_running"] == 1 for stats in snapshots)
    for stats in snapshots:
        assert stats["executed_tokens"] == stats["num_planned_tokens"]  # one step outstanding at most
        assert stats["kv_cache_usage"] == 1 - stats["num_free_pages"] / stats["num_pages"]
        assert (stats["kv_cache_usage"] > 0) == (stats["num_running"] == 1)
    generation.result(DEADLINE_S)


def test_stats_tell_hits_and_reasons(llm: LLM) -> None:
    tokens(llm)
    assert llm.get_stats()["prefix_hit_rate"] == 0
    llm.generate([*PROMPTS[0], 7], SamplingParams(max_tokens=1))
    llm.generate_async(PROMPTS[1], SamplingParams(max_tokens=200, ignore_eos=True)).abort()
    llm.encode(PROMPTS[1])
    stats = asyncio.run(llm.get_stats_async())
    # Of the 71 tokens all but the last are found; the rest of the 400 or so ran.
    assert stats["num_cached_tokens"] >= 70 and 0.1 < stats["prefix_hit_rate"] < 0.6
    assert stats["finish_reasons"] == {"length": 4, "cancelled": 1}
    llm.shutdown()
    assert llm.get_stats()["finish_reasons"] == stats["finish_reasons"]
    with pytest.raises(EngineError, match="shut down"):
        llm.reset_prefix_cache()


def test_a_trace_tells_what_requests_went_through(llm: LLM) -> None:
    prompts = [[7, 8, 9], [10, 11]]
    outputs = llm.generate(prompts, SamplingParams(max_tokens=3, ignore_eos=True), use_tqdm=False)
    trace = llm.get_trace()
    for output in outputs:
        kinds = [event.kind for event in trace.events if event.request_id == output.request_id]
        assert kinds == ["queued", "admitted", "chunk", "first_token", "finished"]
        assert output.metrics is not None and output.metrics.num_output_tokens == 3
        assert output.metrics.queue_s is not None and output.metrics.prefill_s is not None
    assert trace.steps[-1].committed_s > trace.steps[-1].planned_s > 0


def test_reset_prefix_cache_forgets(llm: LLM, expected: list[list[list[int]]]) -> None:
    params = SamplingParams(max_tokens=1)
    assert llm.generate(PROMPTS[0], params).num_cached_tokens == 0
    assert llm.generate(PROMPTS[0], params).num_cached_tokens == 69
    running = llm.generate_async(PROMPTS[1], GREEDY)
    llm.reset_prefix_cache()
    assert running.result(DEADLINE_S).outputs[0].token_ids == expected[0][1]
    assert llm.generate(PROMPTS[0], params).num_cached_tokens == 0


def test_kv_cache_events(folders: tuple[Path, Path], llm: LLM) -> None:
    with pytest.raises(ConfigError, match="event_buffer_max_size"):
        llm.get_kv_cache_events()
    config = KvCacheConfig(event_buffer_max_size=64)
    with LLM(folders[0], **OPTIONS, kv_cache_config=config) as recording:
        recording.generate(PROMPTS[0], SamplingParams(max_tokens=1))
        events = recording.get_kv_cache_events()
        stored = [event for event in events if event["type"] == "stored"]
        assert stored[0]["token_ids"] == PROMPTS[0][:64]
        assert asyncio.run(recording.get_kv_cache_events_async()) == []


@pytest.mark.parametrize("level", [1, 2])
def test_sleep_refuses_requests_until_wake_up(llm: LLM, expected: list[list[list[int]]], level: int) -> None:
    tokens(llm)
    llm.sleep(level)
    llm.sleep(level)
    refused = llm.generate(PROMPTS[0], GREEDY)
    assert refused.error is not None and refused.error.code == "engine_asleep"
    assert "wake_up()" in str(refused.error)
    assert llm.get_stats()["sleep_level"] == level
    with pytest.raises(ConfigError, match="asleep"):
        llm.update_weights({})
    llm.wake_up()
    llm.wake_up()
    assert tokens(llm) == expected[0]
    assert llm.get_stats()["sleep_level"] == 0


def test_sleep_waits_for_what_runs(llm: LLM) -> None:
    params = SamplingParams(max_tokens=100, ignore_eos=True)
    running = llm.generate_async(PROMPTS[0], params)
    aborted = llm.generate_async(PROMPTS[1], SamplingParams(max_tokens=180, ignore_eos=True))
    sleeping = llm._service.command("sleep", level=1)
    late = llm.generate_async(PROMPTS[1], params)
    aborted.abort()
    sleeping.result(DEADLINE_S)
    # Both ended before the engine slept; what came after the call was not begun.
    assert len(running.result(0.5).outputs[0].token_ids) == 100
    assert aborted.result(0.5).outputs[0].finish_reason == "cancelled"
    error = late.result(DEADLINE_S).error
    assert error is not None and error.code == "engine_asleep"
    with pytest.raises(ConfigError, match="1 frees the KV cache"):
        llm.sleep(3)


def test_sleep_gives_memory_back(tmp_path: Path) -> None:
    """Resident bytes, of a model whose weights and pages are far more than what the test itself moves."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 10_000,
        "hidden_size": 512,
        "intermediate_size": 1024,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "dtype": "float32",
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    options = OPTIONS | {"max_seq_len": 2048, "load_format": "dummy", "skip_tokenizer_init": True}
    prompt = [i % 10_000 for i in range(1000)]
    with LLM(tmp_path, **options) as llm:
        params = SamplingParams(max_tokens=2, ignore_eos=True)
        first = llm.generate(prompt, params).outputs[0].token_ids
        used_bytes = 1000 * 2 * 4 * 512 * 4
        awake = resident_bytes()
        llm.sleep(1)
        assert awake - resident_bytes() > 0.8 * used_bytes
        llm.sleep(2)
        asleep = resident_bytes()
        assert awake - asleep > 0.8 * (used_bytes + llm.startup.weight_bytes)
        llm.wake_up()
        assert resident_bytes() - asleep > 0.8 * llm.startup.weight_bytes
        assert llm.generate(prompt, params).outputs[0].token_ids == first
        before = resident_bytes()
        llm.update_weights(tmp_path)
        # Old and new weights are never in memory together for longer than the change; afterwards not at all.
        assert resident_bytes() - before < 0.3 * llm.startup.weight_bytes


def resident_bytes() -> int:
    return psutil.Process().memory_info().rss


def test_update_weights_from_a_checkpoint_and_back(
    folders: tuple[Path, Path], llm: LLM, expected: list[list[list[int]]]
) -> None:
    assert tokens(llm) == expected[0]
    llm.update_weights(folders[1])
    # The second prompt's prefix is in the cache of the old weights: a hit would show.
    assert tokens(llm) == expected[1]
    llm.sleep(2)
    llm.wake_up()
    assert tokens(llm) == expected[1]
    llm.update_weights(str(folders[0]))
    assert tokens(llm) == expected[0]


def test_update_weights_from_tensors(llm: LLM, expected: list[list[list[int]]]) -> None:
    weights = tiny_llama(seed=9).state_dict()
    llm.update_weights(weights)
    for tensor in weights.values():
        tensor.zero_()
    assert tokens(llm) == expected[1]
    with pytest.raises(ConfigError, match="came from memory"):
        llm.sleep(2)
    llm.sleep(1)
    llm.wake_up()
    assert tokens(llm) == expected[1]


def test_an_update_that_does_not_fit_leaves_the_old_weights(
    llm: LLM, expected: list[list[list[int]]], tmp_path: Path
) -> None:
    weights = tiny_llama(seed=9).state_dict()
    renamed = {name.replace("layers.1.", "layer.1."): tensor for name, tensor in weights.items()}
    with pytest.raises(CheckpointError, match=r"(?s)missing: model\.layers\.1.*unexpected: model\.layer\.1"):
        llm.update_weights(renamed)
    with pytest.raises(CheckpointError, match=r"misshapen: lm_head\.weight"):
        llm.update_weights(weights | {"lm_head.weight": weights["lm_head.weight"][:-1]})
    with pytest.raises(CheckpointError, match=r"a tensor of torch\.int64"):
        llm.update_weights(weights | {"lm_head.weight": torch.zeros(2, dtype=torch.int64)})
    wider = write_folder(tiny_llama(intermediate_size=128), tmp_path / "wider")
    with pytest.raises(CheckpointError, match="intermediate_size is 128, not 96"):
        llm.update_weights(wider)
    with pytest.raises(CheckpointError):
        llm.update_weights(tmp_path / "nowhere")
    assert tokens(llm) == expected[0]


def test_an_update_that_fails_half_way_says_so_until_one_succeeds(
    folders: tuple[Path, Path], llm: LLM, expected: list[list[list[int]]]
) -> None:
    weights = tiny_llama(seed=9).state_dict()
    weights["model.norm.weight"][3] = float("nan")
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight.*NaN"):
        llm.update_weights(weights)
    refused = llm.generate(PROMPTS[0], GREEDY)
    assert refused.error is not None and "update_weights()" in str(refused.error)
    llm.update_weights(folders[1])
    assert tokens(llm) == expected[1]


def test_an_update_waits_for_what_runs_and_later_requests_wait_for_it(
    folders: tuple[Path, Path], llm: LLM, expected: list[list[list[int]]]
) -> None:
    before = llm.generate_async(PROMPTS[0], GREEDY)
    updating = llm._service.command("update_weights", source=folders[1])
    after = llm.generate_async(PROMPTS[0], GREEDY)
    updating.result(DEADLINE_S)
    assert before.result(DEADLINE_S).outputs[0].token_ids == expected[0][0]
    assert after.result(DEADLINE_S).outputs[0].token_ids == expected[1][0]


def test_the_async_door_has_the_same_calls(
    folders: tuple[Path, Path], expected: list[list[list[int]]]
) -> None:
    async def test() -> None:
        async with AsyncLLM(folders[0], **OPTIONS) as llm:
            await llm.sleep(2)
            await llm.wake_up()
            await llm.reset_prefix_cache()
            await llm.update_weights(folders[1])
            assert (await llm.generate(PROMPTS[0], GREEDY)).outputs[0].token_ids == expected[1][0]
            assert (await llm.get_stats())["num_running"] == 0
            with pytest.raises(ConfigError, match="event_buffer_max_size"):
                await llm.get_kv_cache_events()

    asyncio.run(asyncio.wait_for(test(), DEADLINE_S))
