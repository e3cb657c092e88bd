"""How are the H100 benchmark's rows measured that are more than one piece of work? One function a row.

P15 starts processes, P16 looks for idle time between a decode step's kernels, P19 shares a prefix, P27
decodes behind long prompts. Invariant: each returns {key: value} for the keys that `h100_rows.PARTS` names,
in the unit of `UNITS`, and fails where the engine did other work than was asked of it.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from gpu_spans import spans_of

from slipstream import LLM, SamplingParams

SHARED, OWN = 4096, 64
LONG, LONG_OUTPUT = 32768, 256
RUNS = 3
# Kernels that overlap the one before them leave no gap; a step's first kernels follow its host's work.
STEADY = 24

READY = """
import json, sys, tempfile, time
started = time.perf_counter()
import slipstream
imported = time.perf_counter()
from slipstream import LLM, SamplingParams
folder = sys.argv[1]
llm = LLM(folder, load_format="dummy", skip_tokenizer_init=True, device="cuda", max_seq_len=8192)
ready = time.perf_counter()
llm.generate([list(range(5, 25))], SamplingParams(max_tokens=2, ignore_eos=True), use_tqdm=False)
first = time.perf_counter() - ready
print(json.dumps({"import": imported - started, "ready": ready - imported, "first": first}))
"""


def draw(rng: random.Random, count: int, vocab: int) -> list[int]:
    return [rng.randrange(vocab) for _ in range(count)]


def generate(llm: LLM, prompts: list[list[int]], output: int) -> float:
    """Return the seconds of a whole call. Raises SystemExit where a request got other than it asked for."""
    params = SamplingParams(max_tokens=output, ignore_eos=True)
    started = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False, raise_on_error=True)
    seconds = time.perf_counter() - started
    if any(len(one.outputs[0].token_ids) != output for one in outputs):
        raise SystemExit("a request did not get the tokens it asked for; the figure means nothing")
    return seconds


def median(measure: Callable[[], float]) -> float:
    return statistics.median(measure() for _ in range(RUNS))


def start_up(folder: str) -> dict[str, float]:
    """P15, in seconds: a process that imports the library and one that makes an engine ready, each anew."""
    import json

    found = []
    for _ in range(RUNS):
        done = subprocess.run(
            [sys.executable, "-c", READY, folder], capture_output=True, text=True, check=True
        )
        found.append(json.loads(done.stdout.strip().splitlines()[-1]))
    return {f"P15.{part}": statistics.median(one[part] for one in found) for part in ("import", "ready")}


def idle_share(llm: LLM) -> dict[str, float]:
    """P16: the share of steady decode steps in which no kernel ran, by the number of rows."""
    rng, vocab = random.Random(16), llm.startup.limits.vocab_size
    shares: dict[str, float] = {}
    for rows in (1, 64, 256):
        prompts = [draw(rng, 128, vocab) for _ in range(rows)]
        generate(llm, prompts, STEADY)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            generate(llm, prompts, STEADY)
            torch.cuda.synchronize()
        spans = spans_of(profile)
        # The last half in time is decoding alone, whatever the prompts took.
        middle = spans[0][0] + (spans[-1][1] - spans[0][0]) * (0.5 if rows == 1 else 0.9)
        steady = [span for span in spans if span[0] >= middle]
        idle, end = 0.0, steady[0][1]
        for first, last, _ in steady:
            idle += max(0.0, first - end)
            end = max(end, last)
        shares[f"P16.{rows}"] = idle / (end - steady[0][0])
    return shares


def shared_prefix(llm: LLM) -> dict[str, float]:
    """P19: first tokens in ms behind a prefix that is new and one that is cached; 64 at once, tokens/s."""
    rng, vocab = random.Random(19), llm.startup.limits.vocab_size
    colds: list[float] = []
    warms: list[float] = []
    for i in range(RUNS + 2):
        prefix = draw(rng, SHARED, vocab)
        cold = generate(llm, [prefix + draw(rng, OWN, vocab)], 1)
        before = llm.get_stats()["num_cached_tokens"]
        warm = generate(llm, [prefix + draw(rng, OWN, vocab)], 1)
        if llm.get_stats()["num_cached_tokens"] - before < SHARED:
            raise SystemExit("P19: the prefix was not reused; the figure means nothing")
        if i >= 2:
            colds.append(cold)
            warms.append(warm)

    def many() -> float:
        prefix = draw(rng, SHARED, vocab)
        generate(llm, [prefix + draw(rng, OWN, vocab)], 1)
        return generate(llm, [prefix + draw(rng, OWN, vocab) for _ in range(64)], 128)

    many()
    return {
        "P19.cold": 1e3 * statistics.median(colds),
        "P19.warm": 1e3 * statistics.median(warms),
        "P19.64": 64 * 128 / median(many),
    }


def long_context(llm: LLM) -> dict[str, float]:
    """P27: the first token of 32k in ms; tokens/s while one request, and while eight decode behind it.

    The prompts of first tokens are new, those behind which is decoded are cached from the second call on.
    """
    rng, vocab = random.Random(27), llm.startup.limits.vocab_size

    def prompts(requests: int) -> list[list[int]]:
        return [draw(rng, LONG, vocab) for _ in range(requests)]

    generate(llm, prompts(1), 2)
    first = median(lambda: generate(llm, prompts(1), 1))
    one, eight = prompts(1), prompts(8)
    generate(llm, eight, 1)
    return {
        "P27.ttft": 1e3 * first,
        "P27.b1": median(lambda: asyncio.run(decode_rate(llm, one))),
        "P27.b8": median(lambda: asyncio.run(decode_rate(llm, eight))),
    }


async def decode_rate(llm: LLM, prompts: list[list[int]]) -> float:
    """Return tokens/s from when every request has its first token until one of them has its last."""
    params = SamplingParams(max_tokens=LONG_OUTPUT, ignore_eos=True)
    arrivals: list[list[float]] = []

    async def read(prompt: list[int]) -> None:
        times: list[float] = []
        arrivals.append(times)
        async for output in llm.generate_async(prompt, params, streaming=True):
            times += [time.perf_counter()] * len(output.outputs[0].token_ids_diff)

    await asyncio.gather(*(read(prompt) for prompt in prompts))
    if any(len(times) != LONG_OUTPUT for times in arrivals):
        raise SystemExit("a request did not get the tokens it asked for; the figure means nothing")
    first, last = max(times[0] for times in arrivals), min(times[-1] for times in arrivals)
    return sum(first < at <= last for times in arrivals for at in times) / (last - first)


UNITS: dict[str, str] = {
    "P15.import": "s",
    "P15.ready": "s",
    "P16.1": "share of a decode step",
    "P16.64": "share of a decode step",
    "P16.256": "share of a decode step",
    "P19.cold": "ms",
    "P19.warm": "ms",
    "P19.64": "output tokens/s",
    "P27.ttft": "ms",
    "P27.b1": "output tokens/s",
    "P27.b8": "output tokens/s",
}
# What of the engine each needs beside the defaults of `h100.py`, and the function that measures.
ON_ENGINE: dict[str, tuple[dict[str, Any], Callable[[LLM], dict[str, float]]]] = {
    "P16": ({}, idle_share),
    "P19": ({"reuse": True}, shared_prefix),
    "P27": ({"max_seq_len": LONG + LONG_OUTPUT, "reuse": True}, long_context),
}
