"""Does a model in a process of its own say exactly what it says in this one? The same requests, both ways."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slipstream.core.errors import ConfigError
from slipstream.core.kv_retention import KvCacheRetentionConfig, TokenRangeRetentionConfig
from slipstream.core.outputs import RequestOutput
from slipstream.core.request import RequestOptions
from slipstream.core.sampling_params import SamplingParams
from slipstream.engine.config import EngineConfig
from slipstream.engine.pooling import hidden_states_only, pool
from slipstream.engine.service import EngineService, local_service, process_service
from slipstream.engine.step_records import EngineTrace
from tests.engine import tiny
from tests.engine.poisoned_child import POISON, RAISE
from tests.engine.served import DEADLINE_S
from tests.engine.tiny import END_OF_TURN, one_thread, tiny_gemma3, write_folder

CHILD = "tests.engine.poisoned_child"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> EngineConfig:
    folder = write_folder(tiny_gemma3(), tmp_path_factory.mktemp("model"), eos_token_ids=(END_OF_TURN,))
    return EngineConfig(model=str(folder), dtype="float32", max_beam_width=3, seed=11)


@pytest.fixture(scope="module", autouse=True)
def lone_thread() -> Iterator[None]:
    """Models this small lose by a second thread, here and in the child."""
    with one_thread(), pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(scope="module")
def local(config: EngineConfig) -> Iterator[EngineService]:
    service = local_service(config)
    yield service
    service.close()


@pytest.fixture(scope="module")
def started(config: EngineConfig) -> Iterator[tuple[EngineService, dict[str, Any]]]:
    """An engine in a process of its own, and its statistics when it said that it was ready."""
    service = process_service(config, module=CHILD)
    yield service, service.stats().result(DEADLINE_S)
    service.close()


@pytest.fixture(scope="module")
def remote(started: tuple[EngineService, dict[str, Any]]) -> EngineService:
    return started[0]


def send(
    service: EngineService, prompt: Any, params: SamplingParams, *, streams: bool = False, **more: Any
) -> Future[RequestOutput]:
    future: Future[RequestOutput] = Future()
    request = service.create_request(service.prompts.encode(prompt), params, **more)
    service.submit(
        request, lambda output: future.set_result(output) if output.finished else None, streams=streams
    )
    return future


def prompt_ids(length: int, *, seed: int) -> list[int]:
    """Ordinary tokens, none of them poisoned."""
    return [5 if token in (POISON, RAISE) else token for token in tiny.prompt_ids(length, seed=seed)]


def requests() -> list[tuple[Any, SamplingParams]]:
    """Twenty requests of every kind."""
    rng = random.Random(3)

    def params(**more: Any) -> SamplingParams:
        return SamplingParams(**({"max_tokens": rng.randrange(5, 25), "ignore_eos": True} | more))

    prompts: list[Any] = [prompt_ids(rng.randrange(1, 60), seed=i) for i in range(14)]
    return [
        (prompts[0], params()),
        ("The capital of France", params()),
        (prompts[1], params(logprobs=3)),
        (prompts[2], params(prompt_logprobs=2)),
        (prompts[3], params(logprobs=1, prompt_logprobs=0)),
        (prompts[4], params(temperature=1.0, seed=5)),
        (prompts[4], params(temperature=0.7, top_p=0.9, top_k=20, min_p=0.01, seed=6, n=2)),
        (prompts[5], params(temperature=1.0, n=3, seed=1, logprobs=0)),
        (prompts[6], params(temperature=1.2, best_of=3, n=2, seed=8)),
        (prompts[7], params(repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=-0.2)),
        (prompts[8], params(logit_bias={50: 20.0, 51: -100.0})),
        (prompts[9], params(allowed_token_ids=list(range(60, 90)))),
        (prompts[9], params(bad_token_ids=[70, 71], bad=["ba", "xyz"], no_repeat_ngram_size=3)),
        (prompts[10], params(use_beam_search=True, beam_width=3, n=2)),
        ("abc", params(stop=["a", "o"], max_tokens=40)),
        (prompts[11], params(stop_token_ids=list(range(40, 200)), min_tokens=4, ignore_eos=False)),
        (prompts[12], params(return_context_logits=True, return_generation_logits=True)),
        (prompts[13], params(temperature=1.0)),  # the engine's own seed
        (prompts[13], params(priority=-5, cache_salt="tenant-a")),
        ([5, 6, 7] * 40, params(truncate_prompt_tokens=9, detokenize=False)),
    ]


# Sums in float32 are taken in another order where memory is aligned otherwise: some 1e-7 of values about 1,
# and of logits, which are about 10 here, some 1e-6.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def numbers(entries: Any) -> tuple[list[Any], list[float]]:
    """Split logprobs into what has to be equal and what close."""
    tokens: list[Any] = []
    values: list[float] = []
    for entry in entries or ():
        for token, logprob in (entry or {}).items():
            tokens.append((token, logprob.decoded_token))
            values.append(logprob.logprob)
    return tokens, values


def close(one: Any, other: Any) -> None:
    assert (one is None) == (other is None)
    if one is not None:
        np.testing.assert_allclose(np.asarray(one), np.asarray(other), **CLOSE)


def same_logprobs(one: Any, other: Any) -> None:
    (tokens, values), (other_tokens, other_values) = numbers(one), numbers(other)
    assert (one is None) == (other is None) and tokens == other_tokens
    close(values, other_values)


def same(one: RequestOutput, other: RequestOutput) -> None:
    assert one.error is None and other.error is None
    assert (one.prompt, one.prompt_token_ids) == (other.prompt, other.prompt_token_ids)
    same_logprobs(one.prompt_logprobs, other.prompt_logprobs)
    close(one.context_logits, other.context_logits)
    assert len(one.outputs) == len(other.outputs)
    for a, b in zip(one.outputs, other.outputs, strict=True):
        assert (a.token_ids, a.text) == (b.token_ids, b.text)
        assert (a.finish_reason, a.stop_reason) == (b.finish_reason, b.stop_reason)
        same_logprobs(a.logprobs, b.logprobs)
        close(a.cumulative_logprob, b.cumulative_logprob)
        close(a.generation_logits, b.generation_logits)


def test_twenty_requests_are_answered_alike(local: EngineService, remote: EngineService) -> None:
    """One after the other, so that float32 sums are taken in the same order on both sides."""
    cases = requests()
    assert len(cases) == 20
    for prompt, params in cases:
        same(send(local, prompt, params).result(DEADLINE_S), send(remote, prompt, params).result(DEADLINE_S))


def test_requests_all_at_once_are_answered_alike(local: EngineService, remote: EngineService) -> None:
    """Tokens do not depend on the batch; logits may differ in their last bits."""
    both = [[send(service, *case, streams=False) for case in requests()] for service in (local, remote)]
    seen = 0
    for (_, params), one, other in zip(requests(), *both, strict=True):
        outputs = [future.result(DEADLINE_S) for future in (one, other)]
        assert [output.error for output in outputs] == [None, None]
        # Without a seed of their own, requests follow the engine's, in the order of their creation.
        tokens = [[sample.token_ids for sample in output.outputs] for output in outputs]
        assert tokens[0] == tokens[1], params
        seen += 1
    assert seen == 20


def test_embeddings_are_alike(local: EngineService, remote: EngineService) -> None:
    params = SamplingParams(max_tokens=1, detokenize=False)
    for length in (1, 7, 100):
        outputs = [
            send(service, prompt_ids(length, seed=length), params, change=hidden_states_only).result(
                DEADLINE_S
            )
            for service in (local, remote)
        ]
        vectors = [pool(output, "mean", normalize=True).embedding for output in outputs]
        assert vectors[0] is not None
        close(vectors[0], vectors[1])


def test_options_cross(remote: EngineService) -> None:
    ranges = [TokenRangeRetentionConfig(token_start=0, token_end=8, priority=90, duration_ms=50.0)]
    retention = KvCacheRetentionConfig(token_range_retention_configs=ranges, decode_retention_priority=5)
    options = RequestOptions(timeout_s=0.001, kv_retention=retention)
    long = SamplingParams(max_tokens=400, ignore_eos=True)
    output = send(remote, prompt_ids(30, seed=2), long, options=options).result(DEADLINE_S)
    assert output.outputs[0].finish_reason == "timeout" and output.error is None
    output = send(remote, prompt_ids(30, seed=2), SamplingParams(), options=RequestOptions(timeout_s=60.0))
    assert output.result(DEADLINE_S).outputs[0].finish_reason == "length"


def test_commands_do_there_what_they_do_here(remote: EngineService, config: EngineConfig) -> None:
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    prompt = prompt_ids(64, seed=4)
    before = send(remote, prompt, params).result(DEADLINE_S).outputs[0].token_ids
    assert send(remote, prompt, params).result(DEADLINE_S).num_cached_tokens > 0
    remote.command("reset_prefix_cache").result(DEADLINE_S)
    assert send(remote, prompt, params).result(DEADLINE_S).num_cached_tokens == 0
    with pytest.raises(ConfigError, match="1 frees the KV cache"):
        remote.command("sleep", level=3).result(DEADLINE_S)
    remote.command("sleep", level=2).result(DEADLINE_S)
    error = send(remote, prompt, params).result(DEADLINE_S).error
    assert error is not None and error.code == "engine_asleep"
    remote.command("wake_up").result(DEADLINE_S)
    remote.command("update_weights", source=str(config.model)).result(DEADLINE_S)
    assert send(remote, prompt, params).result(DEADLINE_S).outputs[0].token_ids == before
    with pytest.raises(ConfigError, match="event_buffer_max_size"):
        remote.command("kv_cache_events").result(DEADLINE_S)
    stats = remote.stats().result(DEADLINE_S)
    assert stats["num_free_pages"] == stats["num_pages"] and stats["sleep_level"] == 0
    trace = remote.command("trace").result(DEADLINE_S)
    assert isinstance(trace, EngineTrace) and trace.steps and trace.num_dropped_steps == 0
    # Under the names that the door gave, and nothing of what ran before it came.
    assert {event.request_id.startswith(remote.service_id) for event in trace.events} == {True}


def test_r37_nothing_is_left_of_the_first_token(
    started: tuple[EngineService, dict[str, Any]], local: EngineService
) -> None:
    """An engine's process says it is ready once it has generated a token, and has forgotten it by then."""
    service, stats = started
    assert stats["num_plans"] == stats["executed_tokens"] == stats["num_cached_tokens"] == 0
    assert stats["num_free_pages"] == stats["num_pages"]
    assert service.info.limits == local.info.limits
    assert service.info.report[0] == local.info.report[0]


VICTIMS = [prompt_ids(9 + i, seed=90 + i) for i in range(3)]
LONG = SamplingParams(max_tokens=30, ignore_eos=True)


@pytest.mark.parametrize(("token", "code"), [(POISON, "numerical_error"), (RAISE, "")])
def test_r39_r40_a_failing_row_or_step_fails_alone(
    remote: EngineService, local: EngineService, token: int, code: str
) -> None:
    """NaN in one row's logits ends that request, a step that raises those that were in it, and no other."""
    expected = [send(local, victim, LONG).result(DEADLINE_S).outputs[0].token_ids for victim in VICTIMS]
    assert not any(marker in ids for ids in expected for marker in (POISON, RAISE))
    victims = [send(remote, victim, LONG) for victim in VICTIMS]
    output = send(remote, [5, token, 6], LONG).result(DEADLINE_S)
    assert output.error is not None and output.outputs[0].finish_reason == "error"
    for victim, tokens in zip(victims, expected, strict=True):
        result = victim.result(DEADLINE_S)
        if token == POISON:
            assert output.error.code == code
            assert result.error is None and result.outputs[0].token_ids == tokens
    for victim, tokens in zip(VICTIMS, expected, strict=True):
        assert send(remote, victim, LONG).result(DEADLINE_S).outputs[0].token_ids == tokens
    stats = remote.stats().result(DEADLINE_S)
    assert stats["num_free_pages"] == stats["num_pages"] and remote.health().is_ready


def test_r41_a_row_with_every_token_masked_ends_alone(remote: EngineService, local: EngineService) -> None:
    masked = SamplingParams(
        max_tokens=9, ignore_eos=True, allowed_token_ids=[5], bad=[], no_repeat_ngram_size=1
    )
    outputs = [send(service, [9, 8, 5], masked).result(DEADLINE_S) for service in (local, remote)]
    assert outputs[0].error is not None and outputs[1].error is not None
    assert outputs[0].error.message == outputs[1].error.message and "masked" in outputs[1].error.message
    assert send(remote, [9, 8], LONG).result(DEADLINE_S).error is None


@pytest.mark.slow
def test_real_weights_say_the_same(smollm2_path: Path) -> None:
    """Packed weights and native steps: bits do not depend on where the process's memory lies."""
    config = EngineConfig(model=str(smollm2_path))
    params = SamplingParams(max_tokens=48, logprobs=2, n=2, temperature=0.8, seed=3)
    greedy = SamplingParams(max_tokens=48, logprobs=2)
    prompts = ["Once upon a time", "The capital of France is", "def fibonacci(n):", "List three rivers:"]
    each: list[list[RequestOutput]] = []
    for make in (local_service, process_service):
        service = make(config)
        try:
            futures = [send(service, prompt, one) for prompt in prompts for one in (greedy, params)]
            each.append([future.result(DEADLINE_S * 4) for future in futures])
        finally:
            service.close()
    for one, other in zip(*each, strict=True):
        same(one, other)
        assert len(one.outputs[0].token_ids) >= 8


def test_a_door_alone_loads_no_torch(config: EngineConfig, tmp_path: Path) -> None:
    """What serves HTTP beside an engine's process stays small."""
    import subprocess

    code = (
        "import sys, slipstream.engine.service, slipstream.engine.process_client, "
        "slipstream.engine.engine_process; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=DEADLINE_S)
