"""Do the figures follow from what the engine did, and does a measurement fail where it did something else?"""

from __future__ import annotations

from typing import Any

import pytest

from slipstream.bench.measure import (
    BenchError,
    all_at_once,
    at_concurrency,
    first_token_ms,
    in_batches,
    measure,
    measure_once,
    per_token_ms,
    percentile,
    require_executed,
)
from slipstream.bench.workload import BenchRequest, RandomWorkload, expected_tokens
from slipstream.core.errors import RequestError
from slipstream.core.outputs import CompletionOutput, RequestMetrics, RequestOutput
from slipstream.llm import LLM


def some_requests(llm: LLM, count: int = 5) -> list[BenchRequest]:
    limits = llm.startup.limits
    workload = RandomWorkload(num_requests=count, isl=(4, 40), osl=(1, 9), seed=3)
    return workload.draw(llm.tokenizer, vocab_size=limits.vocab_size, eos_token_ids=limits.eos_token_ids)


@pytest.mark.parametrize("load", [all_at_once, in_batches(1), in_batches(2), at_concurrency(2)])
def test_every_load_executes_exactly_the_workload(tiny_llm: LLM, load: Any) -> None:
    requests = some_requests(tiny_llm)
    before = tiny_llm.get_stats()["executed_tokens"]
    figures = measure_once(tiny_llm, requests, load, salt="s", has_reuse=False)
    assert tiny_llm.get_stats()["executed_tokens"] - before == figures.executed_tokens
    assert figures.executed_tokens == expected_tokens(requests) > 0
    assert figures.num_cached_tokens == 0
    assert figures.wall_s > 0 and figures.ttft_ms > 0
    assert figures.ttft_ms <= figures.ttft_p99_ms
    num_output = sum(r.output_tokens for r in requests)
    assert figures.output_tokens_per_s == pytest.approx(num_output / figures.wall_s)


def test_outputs_do_not_depend_on_the_load(tiny_llm: LLM) -> None:
    requests = some_requests(tiny_llm)

    def tokens(load: Any) -> list[list[int]]:
        return [output.outputs[0].token_ids for output in load(tiny_llm, requests, "s")]

    together = tokens(all_at_once)
    assert tokens(in_batches(1)) == tokens(at_concurrency(3)) == together
    assert len({tuple(ids) for ids in together}) == len(together)


def test_warm_up_is_not_counted(tiny_llm: LLM) -> None:
    requests = [BenchRequest([1, 2, 3], 20)]
    said: list[str] = []
    before = tiny_llm.get_stats()["executed_tokens"]
    runs = measure(tiny_llm, requests, all_at_once, num_runs=2, has_reuse=False, notify=said.append)
    assert said == ["warming up", "run 1 of 2", "run 2 of 2"]
    assert [run.executed_tokens for run in runs] == [22, 22]
    # The warm-up ran 3 prompt tokens and 7 of 8 output tokens besides.
    assert tiny_llm.get_stats()["executed_tokens"] - before == 10 + 22 + 22


class Cheat:
    """An engine that skips work: it reports fewer executed tokens, or fewer tokens, than there were."""

    def __init__(self, llm: LLM, *, skipped: int = 0, dropped: int = 0) -> None:
        self._llm = llm
        self._skipped, self._dropped = skipped, dropped
        self._calls = 0

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        outputs = self._llm.generate(*args, **kwargs)
        for output in outputs[:1] if self._dropped else []:
            del output.outputs[0].token_ids[-self._dropped :]
        return outputs

    def generate_async(self, prompt: Any, sampling_params: Any) -> Any:
        return self._llm.generate_async(prompt, sampling_params)

    def get_stats(self) -> dict[str, int]:
        self._calls += 1
        stats = self._llm.get_stats()
        stats["executed_tokens"] -= self._skipped * self._calls
        return stats


def test_an_engine_that_skips_a_token_fails_the_bench(tiny_llm: LLM) -> None:
    requests = [BenchRequest([1, 2, 3], 4)]
    measure_once(Cheat(tiny_llm), requests, all_at_once, salt="s", has_reuse=False)
    with pytest.raises(BenchError, match=r"executed 5 tokens and 6 were asked for"):
        measure_once(Cheat(tiny_llm, skipped=1), requests, all_at_once, salt="s", has_reuse=False)
    # With reuse on, fewer is what is wanted.
    measure_once(Cheat(tiny_llm, skipped=1), requests, all_at_once, salt="s", has_reuse=True)


def test_a_short_output_fails_the_bench(tiny_llm: LLM) -> None:
    with pytest.raises(BenchError, match="got 3 tokens and asked for 4"):
        measure_once(
            Cheat(tiny_llm, dropped=1), [BenchRequest([1, 2, 3], 4)], all_at_once, salt="s", has_reuse=True
        )


@pytest.mark.parametrize("load", [all_at_once, in_batches(1), at_concurrency(2)])
def test_a_refused_request_fails_the_bench(tiny_llm: LLM, load: Any) -> None:
    too_long = BenchRequest([1], tiny_llm.startup.limits.max_seq_len)
    with pytest.raises(RequestError):
        measure_once(tiny_llm, [BenchRequest([1], 1), too_long], load, salt="s", has_reuse=False)


def test_preemptions_are_named_as_the_reason() -> None:
    with pytest.raises(BenchError, match=r"2 preemptions.*kv-cache-max-tokens"):
        require_executed(12, 10, num_preemptions=2)
    with pytest.raises(BenchError, match="report this"):
        require_executed(9, 10, num_preemptions=2)
    require_executed(10, 10, num_preemptions=0)


def output_at(arrival: float, first: float, finished: float, count: int) -> RequestOutput:
    sample = CompletionOutput(0, token_ids=[1] * count)
    metrics = RequestMetrics(arrival, first, finished)
    return RequestOutput("r", None, [1], [sample], finished=True, metrics=metrics)


def test_times_follow_from_the_clock() -> None:
    outputs = [output_at(1.0, 1.5, 2.5, 5), output_at(0.0, 0.25, 0.25, 1)]
    assert first_token_ms(outputs) == [500.0, 250.0]
    # One second for the four tokens after the first; an output of one token has none.
    assert per_token_ms(outputs) == [250.0]


@pytest.mark.parametrize(
    ("values", "percent", "expected"),
    [
        ([5.0], 99, 5.0),
        ([3.0, 1.0, 2.0], 50, 2.0),
        (list(range(1, 101)), 99, 99),
        (list(range(1, 202)), 99, 199),
    ],
)
def test_percentile_is_the_nearest_rank(values: list[float], percent: float, expected: float) -> None:
    assert percentile(values, percent) == expected
