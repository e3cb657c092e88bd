"""How fast did an engine run a workload, and did it run all of it?

Invariant: a figure exists only for work that was done. The tokens an engine says it executed must equal those
the workload needs (`workload.expected_tokens`), unless prefixes are reused on purpose; otherwise the
measurement fails. Time to first token counts from submission, so it includes waiting.
"""

from __future__ import annotations

import asyncio
import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from slipstream.bench.workload import BenchRequest, expected_tokens
from slipstream.core.errors import SlipstreamError
from slipstream.core.outputs import RequestOutput
from slipstream.core.sampling_params import SamplingParams
from slipstream.engine.progress import generating_bar

# Enough for every shape of a step to have been seen once.
WARM_UP_TOKENS = 8


class BenchError(SlipstreamError):
    """A measurement that proves nothing: the engine did not do what was asked of it."""


class Door(Protocol):
    """What a measurement needs of an `LLM`."""

    def generate(
        self, prompts: Any, sampling_params: Any, *, use_tqdm: bool | None, raise_on_error: bool
    ) -> Any: ...

    def generate_async(self, prompt: Any, sampling_params: Any) -> Any: ...

    def get_stats(self) -> dict[str, int]: ...


# Runs requests on an engine and returns their outputs in order; the string salts the prefix cache.
Load = Callable[[Door, Sequence[BenchRequest], str], list[RequestOutput]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunFigures:
    """One run of a workload. Times are of single requests; None where no output had a second token."""

    wall_s: float
    ttft_ms: float
    ttft_p99_ms: float
    tpot_ms: float | None
    tpot_p99_ms: float | None
    output_tokens_per_s: float
    total_tokens_per_s: float
    executed_tokens: int
    num_cached_tokens: int
    num_preemptions: int


def all_at_once(door: Door, requests: Sequence[BenchRequest], salt: str) -> list[RequestOutput]:
    """Submit every request in one batch."""
    return submit(door, requests, salt, use_tqdm=None)


def submit(
    door: Door, requests: Sequence[BenchRequest], salt: str, *, use_tqdm: bool | None
) -> list[RequestOutput]:
    return door.generate(
        [list(request.prompt_token_ids) for request in requests],
        [params_of(request, salt) for request in requests],
        use_tqdm=use_tqdm,
        raise_on_error=True,
    )


def in_batches(size: int) -> Load:
    """Return a load that submits `size` requests at a time and waits for all of them."""

    def run(door: Door, requests: Sequence[BenchRequest], salt: str) -> list[RequestOutput]:
        outputs: list[RequestOutput] = []
        with generating_bar(len(requests), None) as advance:
            for start in range(0, len(requests), size):
                batch = requests[start : start + size]
                outputs += submit(door, batch, salt, use_tqdm=False)
                for request in batch:
                    advance(request.output_tokens)
        return outputs

    return run


def at_concurrency(limit: int) -> Load:
    """Return a load that keeps `limit` requests in flight: one that ends is followed by the next."""

    def run(door: Door, requests: Sequence[BenchRequest], salt: str) -> list[RequestOutput]:
        return asyncio.run(_keep_in_flight(door, requests, salt, limit))

    return run


async def _keep_in_flight(
    door: Door, requests: Sequence[BenchRequest], salt: str, limit: int
) -> list[RequestOutput]:
    gate = asyncio.Semaphore(limit)
    with generating_bar(len(requests), None) as advance:

        async def one(request: BenchRequest) -> RequestOutput:
            async with gate:
                output = await door.generate_async(list(request.prompt_token_ids), params_of(request, salt))
            if output.error is not None:
                raise output.error
            advance(request.output_tokens)
            return output

        return list(await asyncio.gather(*(one(request) for request in requests)))


def params_of(request: BenchRequest, salt: str) -> SamplingParams:
    """Greedy, exactly as many tokens as asked for; nothing is shared between runs of different `salt`."""
    return SamplingParams(temperature=0.0, max_tokens=request.output_tokens, ignore_eos=True, cache_salt=salt)


def measure(
    door: Door,
    requests: Sequence[BenchRequest],
    load: Load,
    *,
    num_runs: int,
    has_reuse: bool,
    notify: Callable[[str], None],
) -> list[RunFigures]:
    """Run a workload once to warm up, with short outputs, then `num_runs` times, and return the figures.

    `notify` is told what runs now. Raises BenchError where the work done is not the work asked for.
    """
    notify("warming up")
    short = [dataclasses.replace(r, output_tokens=min(r.output_tokens, WARM_UP_TOKENS)) for r in requests]
    load(door, short, "warm-up")
    runs: list[RunFigures] = []
    for number in range(1, num_runs + 1):
        notify(f"run {number} of {num_runs}")
        runs.append(measure_once(door, requests, load, salt=f"run-{number}", has_reuse=has_reuse))
    return runs


def measure_once(
    door: Door, requests: Sequence[BenchRequest], load: Load, *, salt: str, has_reuse: bool
) -> RunFigures:
    before = door.get_stats()
    started = time.perf_counter()
    outputs = load(door, requests, salt)
    wall_s = time.perf_counter() - started
    after = door.get_stats()
    executed = after["executed_tokens"] - before["executed_tokens"]
    preemptions = after["num_preemptions"] - before["num_preemptions"]
    require_outputs(requests, outputs)
    if not has_reuse:
        require_executed(executed, expected_tokens(requests), num_preemptions=preemptions)
    ttft, tpot = first_token_ms(outputs), per_token_ms(outputs)
    num_output = sum(request.output_tokens for request in requests)
    return RunFigures(
        wall_s=wall_s,
        ttft_ms=statistics.median(ttft),
        ttft_p99_ms=percentile(ttft, 99),
        tpot_ms=statistics.median(tpot) if tpot else None,
        tpot_p99_ms=percentile(tpot, 99) if tpot else None,
        output_tokens_per_s=num_output / wall_s,
        total_tokens_per_s=sum(request.num_tokens for request in requests) / wall_s,
        executed_tokens=executed,
        num_cached_tokens=sum(output.num_cached_tokens for output in outputs),
        num_preemptions=preemptions,
    )


def require_outputs(requests: Sequence[BenchRequest], outputs: Sequence[RequestOutput]) -> None:
    """Raise BenchError unless each request got exactly as many tokens as it asked for."""
    for place, (request, output) in enumerate(zip(requests, outputs, strict=True)):
        count = len(output.outputs[0].token_ids)
        if count != request.output_tokens:
            raise BenchError(
                f"Request {place} got {count} tokens and asked for {request.output_tokens} (it ended by "
                f"{output.outputs[0].finish_reason}); its times would mean nothing."
            )


def require_executed(executed: int, expected: int, *, num_preemptions: int) -> None:
    """Raise BenchError unless the engine ran exactly the tokens that were asked of it."""
    if executed == expected:
        return
    if num_preemptions and executed > expected:
        advice = (
            f"{num_preemptions} preemptions made it compute tokens again: raise --kv-cache-max-tokens, or "
            "lower --max-batch-size or --num-requests"
        )
    else:
        advice = "the figures would not be those of the work asked for; please report this"
    raise BenchError(f"The engine executed {executed:,} tokens and {expected:,} were asked for; {advice}.")


def first_token_ms(outputs: Sequence[RequestOutput]) -> list[float]:
    """Return the time from submission to the first token of each request."""
    times: list[float] = []
    for output in outputs:
        assert output.metrics is not None and output.metrics.ttft_s is not None
        times.append(output.metrics.ttft_s * 1000)
    return times


def per_token_ms(outputs: Sequence[RequestOutput]) -> list[float]:
    """Return the mean time of each token after the first, of each request that has one."""
    times: list[float] = []
    for output in outputs:
        metrics, count = output.metrics, len(output.outputs[0].token_ids)
        if count < 2:
            continue
        assert metrics is not None and metrics.finished_s is not None and metrics.first_token_s is not None
        times.append((metrics.finished_s - metrics.first_token_s) * 1000 / (count - 1))
    return times


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the smallest value that at least `percent` of all values do not exceed (nearest rank)."""
    ordered = sorted(values)
    rank = -(-len(ordered) * percent // 100)
    return ordered[max(0, int(rank) - 1)]
