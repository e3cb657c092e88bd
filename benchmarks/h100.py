"""How fast is the engine on one H100? Rows of fixed work through the public API, the floor beside each.

Random weights of the real shapes, random prompt ids, greedy, the end token ignored, prefix reuse off; a
figure is the median of whole calls, so scheduling and Python are inside. A row counts only if every request
got the tokens it asked for and the engine executed exactly the work's tokens.
The floor of a decode step is the bytes it must read over 3.02 TB/s (a copy on that card, read + write); that
of a prompt its products over 800 TFLOP/s.

    python benchmarks/h100.py [--rows P1,P3] [--out benchmarks/results/h100.json]
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import platform
import random
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import host_cost
import torch

from slipstream import LLM, KvCacheConfig, SamplingParams, __version__

RESULT = Path(__file__).parent / "results" / "h100.json"
LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
QWEN3_06B = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 151936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """Requests of equal size. `is_latency` rows are milliseconds of a whole call, others output tokens/s."""

    model: str
    requests: int
    prompt: int
    output: int
    floor: float
    goal: float
    is_latency: bool = False


MODELS = {"Llama-3.1-8B": LLAMA_8B, "Qwen3-0.6B": QWEN3_06B}
# Floors and goals by the reckoning above; goals are what we set out to reach.
WORK = {
    "P1": Work(model="Llama-3.1-8B", requests=1, prompt=128, output=257, floor=201, goal=188),
    "P3": Work(model="Llama-3.1-8B", requests=64, prompt=128, output=128, floor=9610, goal=8600),
    "P5": Work(model="Llama-3.1-8B", requests=256, prompt=128, output=128, floor=21600, goal=18500),
    "P9": Work(model="Llama-3.1-8B", requests=1, prompt=128, output=1, floor=5.0, goal=6.5, is_latency=True),
    "P11": Work(model="Llama-3.1-8B", requests=1, prompt=2048, output=1, floor=39, goal=43, is_latency=True),
    "P17": Work(model="Qwen3-0.6B", requests=1, prompt=128, output=257, floor=2530, goal=1600),
}
HOST_GOALS_MS = {"1": 0.2, "256": 1.0}
RUNS = 5
KERNELS_NAMED = 12


def measure(llm: LLM, name: str, work: Work) -> dict[str, Any]:
    """Run one row's work, twice to warm up, then `RUNS` times, and once under the profiler for the names."""
    rng = random.Random(name)
    vocab = llm.startup.limits.vocab_size
    prompts = [[rng.randrange(vocab) for _ in range(work.prompt)] for _ in range(work.requests)]
    params = SamplingParams(max_tokens=work.output, ignore_eos=True)
    for _ in range(2):
        llm.generate(prompts, params, use_tqdm=False, raise_on_error=True)
    times: list[float] = []
    before = llm.get_stats()["executed_tokens"]
    outputs: Any = []
    for _ in range(RUNS):
        started = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False, raise_on_error=True)
        times.append(time.perf_counter() - started)
    executed = (llm.get_stats()["executed_tokens"] - before) // RUNS
    # The last token of a request is never run.
    expected = work.requests * (work.prompt + work.output - 1)
    if executed != expected or any(len(o.outputs[0].token_ids) != work.output for o in outputs):
        raise SystemExit(
            f"{name}: executed {executed} tokens, expected {expected}; the figure means nothing."
        )
    seconds = statistics.median(times)
    value = seconds * 1e3 if work.is_latency else work.requests * work.output / seconds
    ratio = work.floor / value if work.is_latency else value / work.floor
    return {
        "value": round(value, 2),
        "unit": "ms" if work.is_latency else "output tokens/s",
        "floor": work.floor,
        "floor_ratio": round(ratio, 3),
        "goal": work.goal,
        "is_goal_met": value <= work.goal if work.is_latency else value >= work.goal,
        "work": f"{work.model}, bfloat16, {work.requests} x {work.prompt} in / {work.output} out",
        "command": f"python benchmarks/h100.py --rows {name}",
        "runs_s": [round(t, 4) for t in times],
        "executed_prompt_tokens": work.requests * work.prompt,
        "executed_output_tokens": work.requests * (work.output - 1),
        "distinct_tokens": len({token for o in outputs for token in o.outputs[0].token_ids}),
        "reuse": False,
        "kernels": kernels_of(llm, prompts, dataclasses.replace(work, output=min(work.output, 9))),
    }


def kernels_of(llm: LLM, prompts: list[list[int]], work: Work) -> dict[str, float]:
    """Return the kernels that took most of a short run, with their share of the GPU's time."""
    params = SamplingParams(max_tokens=work.output, ignore_eos=True)
    llm.generate(prompts, params, use_tqdm=False)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        llm.generate(prompts, params, use_tqdm=False)
        torch.cuda.synchronize()
    times = {event.key: event.device_time_total for event in profile.key_averages()}
    total = sum(times.values()) or 1.0
    leading = sorted(times.items(), key=lambda item: -item[1])[:KERNELS_NAMED]
    return {key[:100]: round(time_us / total, 4) for key, time_us in leading}


def measure_host() -> dict[str, Any]:
    """Return the cost of plan + commit per step of steady decoding, by the number of running requests."""
    value = {}
    for running in HOST_GOALS_MS:
        runs = [host_cost.measure(int(running), 100, num_steps=300, traffic="different") for _ in range(RUNS)]
        value[running] = min(run["median_ms"] for run in runs)
    return {
        "value": value,
        "unit": "ms of plan + commit per step, by running requests",
        "floor": None,
        "floor_ratio": None,
        "goal": HOST_GOALS_MS,
        "is_goal_met": all(value[running] <= goal for running, goal in HOST_GOALS_MS.items()),
        "command": "python benchmarks/h100.py --rows P28",
    }


def start(model: str, folder: Path) -> LLM:
    (folder / "config.json").write_text(json.dumps(MODELS[model]), encoding="utf-8")
    return LLM(
        folder,
        load_format="dummy",
        skip_tokenizer_init=True,
        device="cuda",
        max_seq_len=8192,
        kv_cache_config=KvCacheConfig(enable_block_reuse=False),
    )


def commit() -> str:
    done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", default=",".join([*WORK, "P28"]), help="comma-separated")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--commit", default="", help="the commit measured, where git cannot say")
    given = parser.parse_args()
    asked = given.rows.split(",")
    rows: dict[str, Any] = {}
    for model in MODELS:
        names = [name for name in asked if name in WORK and WORK[name].model == model]
        if not names:
            continue
        with tempfile.TemporaryDirectory() as folder, start(model, Path(folder)) as llm:
            for line in llm.startup.report:
                print(f"   {line}", flush=True)
            for name in names:
                row = rows[name] = measure(llm, name, WORK[name])
                share = f"{row['floor_ratio']:.0%} of the floor, goal {row['goal']}"
                print(f"{name}: {row['value']} {row['unit']} ({share}): {row['work']}", flush=True)
        gc.collect()
        torch.cuda.empty_cache()
    if "P28" in asked:
        rows["P28"] = measure_host()
        print(f"P28: {rows['P28']['value']} {rows['P28']['unit']}", flush=True)
    import triton

    record = {
        "device": torch.cuda.get_device_name(),
        "versions": {
            "slipstream": __version__,
            "torch": torch.__version__,
            "triton": triton.__version__,
            "python": platform.python_version(),
        },
        "commit": given.commit or commit(),
        "rows": rows,
    }
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
