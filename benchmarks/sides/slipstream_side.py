"""What does Slipstream do with the same tokens? Its public API, measured by `bench`."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import torch
from protocol import serve

from slipstream import LLM, KvCacheConfig, SamplingParams
from slipstream.bench.measure import all_at_once, measure_once
from slipstream.bench.peak_memory import peak_memory_bytes
from slipstream.bench.report import device_facts, engine_facts, version_facts
from slipstream.bench.workload import BenchRequest, RandomWorkload, pool_tokens

engines: dict[str, LLM] = {}


def load(name: str, path: str, options: dict[str, Any], num_sequences: int, context: int) -> dict[str, Any]:
    """Load a model with room for `num_sequences` sequences of `context` tokens; nothing is reused."""
    tokens = pool_tokens([context] * num_sequences, max_running=num_sequences)
    started = time.perf_counter()
    llm = LLM(
        path,
        device="cpu",
        kv_cache_config=KvCacheConfig(enable_block_reuse=False, max_tokens=tokens),
        use_tqdm=False,
        **options,
    )
    engines[name] = llm
    return {
        "load_s": time.perf_counter() - started,
        "peak_memory_bytes": peak_memory_bytes("cpu"),
        **dataclasses.asdict(engine_facts(llm.startup, path)),
    }


def unload(name: str) -> None:
    engines.pop(name).shutdown()


def draw(name: str, num_requests: int, isl: int, seed: int) -> list[list[int]]:
    """Return random prompts without special ids."""
    llm = engines[name]
    workload = RandomWorkload(num_requests=num_requests, isl=(isl, isl), osl=(1, 1), seed=seed)
    limits = llm.startup.limits
    requests = workload.draw(llm.tokenizer, vocab_size=limits.vocab_size, eos_token_ids=limits.eos_token_ids)
    return [list(request.prompt_token_ids) for request in requests]


def run(name: str, prompts: list[list[int]], output_tokens: int) -> dict[str, Any]:
    """Measure one run as `slipstream bench` does; it fails unless every token asked for was executed."""
    requests = [BenchRequest(prompt, output_tokens) for prompt in prompts]
    figures = measure_once(engines[name], requests, all_at_once, salt="peers", has_reuse=False)
    return {
        "wall_s": figures.wall_s,
        "ttft_s": figures.ttft_ms / 1000,
        "tpot_s": None if figures.tpot_ms is None else figures.tpot_ms / 1000,
        "peak_memory_bytes": peak_memory_bytes("cpu"),
    }


def tokenize(name: str, text: str) -> list[int]:
    """Return what a prompt of text becomes, the begin token included where the model has one."""
    params = SamplingParams(max_tokens=1, detokenize=False)
    return engines[name].generate(text, params, use_tqdm=False, raise_on_error=True).prompt_token_ids


def score(name: str, token_ids: list[int]) -> dict[str, list[Any]]:
    """Return the log-probability of each token but the first, and the likeliest token in its place."""
    output = engines[name].generate(
        token_ids, SamplingParams(max_tokens=1, prompt_logprobs=1), raise_on_error=True
    )
    entries = output.prompt_logprobs
    places = range(1, len(token_ids))
    return {
        "logprobs": [entries[i][token_ids[i]].logprob for i in places],
        "top": [max(entries[i], key=lambda token, i=i: entries[i][token].logprob) for i in places],
    }


def greedy(name: str, prompts: list[list[int]], output_tokens: int) -> list[list[int]]:
    params = SamplingParams(max_tokens=output_tokens, ignore_eos=True, detokenize=False)
    outputs = engines[name].generate(prompts, params, use_tqdm=False, raise_on_error=True)
    return [output.outputs[0].token_ids for output in outputs]


def describe() -> dict[str, Any]:
    return {
        "device": device_facts("cpu"),
        "versions": version_facts(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


if __name__ == "__main__":
    serve(
        {
            "load": load,
            "unload": unload,
            "draw": draw,
            "run": run,
            "tokenize": tokenize,
            "score": score,
            "greedy": greedy,
            "describe": describe,
        }
    )
