"""How fast is the engine on one H100? Rows of fixed work through the public API, the floor beside each.

Random weights of the real shapes, random prompt ids, greedy, the end token ignored, prefix reuse off; a
figure is the median of whole calls, so scheduling and Python are inside. A row counts only if every request
got the tokens it asked for and the engine executed exactly the work's tokens. `h100_rows.py` holds the work,
floors and goals, `h100_parts.py` the rows that are more than one piece of work.

    python benchmarks/h100.py [--rows P1,P3] [--out benchmarks/results/h100.json]
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import random
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h100_parts
import host_cost
import torch
from h100_rows import (
    CALL_MS,
    HOST_GOALS_MS,
    LLAMA_8B,
    MODELS,
    MS_PER_TOKEN,
    PARTS,
    TOKENS_PER_S,
    WORK,
    Work,
)

from slipstream import LLM, KvCacheConfig, SamplingParams, SchedulerConfig, __version__

RESULT = Path(__file__).parent / "results" / "h100.json"
RUNS = 5
KERNELS_NAMED = 12
# Requests under the profiler: more would name the same kernels.
PROFILED = 256


def requests_of(llm: LLM, name: str, work: Work) -> tuple[list[list[int]], list[SamplingParams]]:
    """Return the prompts of a row's work, the same every time, and the parameters of each."""
    rng, vocab, lengths = random.Random(name), llm.startup.limits.vocab_size, work.lengths()
    prompts = [h100_parts.draw(rng, prompt, vocab) for prompt, _ in lengths]
    return prompts, [
        SamplingParams(max_tokens=output, ignore_eos=True, **work.sampling) for _, output in lengths
    ]


def measure(llm: LLM, name: str, work: Work) -> dict[str, Any]:
    """Run one row's work, to warm up, then for the median, and once under the profiler for the names."""
    prompts, params = requests_of(llm, name, work)
    lengths = work.lengths()
    for _ in range(work.warm_ups):
        llm.generate(prompts, params, use_tqdm=False, raise_on_error=True)
    times: list[float] = []
    before = llm.get_stats()["executed_tokens"]
    outputs: Any = []
    for _ in range(work.runs):
        started = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False, raise_on_error=True)
        times.append(time.perf_counter() - started)
    executed = (llm.get_stats()["executed_tokens"] - before) // work.runs
    num_prompt, num_output = (sum(sizes) for sizes in zip(*lengths, strict=True))
    # The last token of a request is never run.
    expected = num_prompt + num_output - work.requests
    got = [len(output.outputs[0].token_ids) for output in outputs]
    if executed != expected or got != [output for _, output in lengths]:
        raise SystemExit(
            f"{name}: executed {executed} tokens, expected {expected}; the figure means nothing."
        )
    seconds = statistics.median(times)
    value = {
        TOKENS_PER_S: num_output / seconds,
        CALL_MS: seconds * 1e3,
        MS_PER_TOKEN: seconds * 1e3 / num_output,
    }
    return record(name, value[work.unit], work.unit, work.floor, work.goal) | {
        "work": work.describe(),
        "runs_s": [round(t, 4) for t in times],
        "executed_prompt_tokens": num_prompt,
        "executed_output_tokens": executed - num_prompt,
        "distinct_tokens": len({token for o in outputs for token in o.outputs[0].token_ids}),
        "reuse": False,
        "kernels": kernels_of(llm, prompts, work),
    }


def record(name: str, value: float, unit: str, floor: float | None, goal: float) -> dict[str, Any]:
    """Return the part that every row has."""
    is_rate = "tokens/s" in unit
    ratio = None if not floor else value / floor if is_rate else floor / value
    return {
        "value": round(value, 4 if value < 10 else 2),
        "unit": unit,
        "floor": floor,
        "floor_ratio": None if ratio is None else round(ratio, 3),
        "goal": goal,
        "is_goal_met": value >= goal if is_rate else value <= goal,
        "command": f"python benchmarks/h100.py --rows {name}",
    }


def kernels_of(llm: LLM, prompts: list[list[int]], work: Work) -> dict[str, float]:
    """Return the kernels that took most of a short run, with their share of the GPU's time."""
    outputs = max(output for _, output in work.lengths())
    params = SamplingParams(max_tokens=min(outputs, 9), ignore_eos=True, **work.sampling)
    prompts = prompts[:PROFILED]
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


def start(
    model: str,
    folder: Path,
    *,
    reuse: bool = False,
    max_seq_len: int = 8192,
    policy: str = "",
    batch_invariant: bool = False,
) -> LLM:
    (folder / "config.json").write_text(json.dumps(MODELS[model]), encoding="utf-8")
    return LLM(
        folder,
        load_format="dummy",
        skip_tokenizer_init=True,
        device="cuda",
        max_seq_len=max_seq_len,
        kv_cache_config=KvCacheConfig(enable_block_reuse=reuse),
        scheduler_config=SchedulerConfig(capacity_scheduler_policy=policy) if policy else None,
        batch_invariant=batch_invariant,
    )


def measure_parts(row: str) -> dict[str, dict[str, Any]]:
    """Return the keys of a row that is more than one piece of work."""
    with tempfile.TemporaryDirectory() as folder:
        if row == "P15":
            (Path(folder) / "config.json").write_text(json.dumps(LLAMA_8B), encoding="utf-8")
            values = h100_parts.start_up(folder)
        else:
            options, function = h100_parts.ON_ENGINE[row]
            with start("Llama-3.1-8B", Path(folder), **options) as llm:
                values = function(llm)
    limits = PARTS[row]
    return {key: record(row, value, h100_parts.UNITS[key], *limits[key]) for key, value in values.items()}


def engine_of(name: str) -> tuple[str, str, bool]:
    """Return what rows must have in common to share an engine."""
    return WORK[name].model, WORK[name].policy, WORK[name].batch_invariant


def measure_works(names: list[str], keep: Callable[[str, dict[str, Any]], None]) -> None:
    """Measure rows of plain work, engine by engine."""
    names = [name for name in names if name in WORK]
    for engine in dict.fromkeys(engine_of(name) for name in names):
        own = [name for name in names if engine_of(name) == engine]
        model, policy, is_invariant = engine
        options = {"policy": policy, "batch_invariant": is_invariant}
        with tempfile.TemporaryDirectory() as folder, start(model, Path(folder), **options) as llm:
            for line in llm.startup.report:
                print(f"   {line}", flush=True)
            for name in own:
                keep(name, measure(llm, name, WORK[name]))
        gc.collect()
        torch.cuda.empty_cache()


def commit() -> str:
    done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def versions() -> dict[str, str]:
    import triton

    return {
        "slipstream": __version__,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
    }


class Record:
    """The standing record: rows measured now replace their like, others keep the commit they are of."""

    def __init__(self, path: Path, commit: str) -> None:
        self._path, self._commit = path, commit
        here = {"device": torch.cuda.get_device_name(), "versions": versions()}
        old = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else here | {"rows": {}}
        if any(old[key] != here[key] for key in here):
            raise SystemExit(f"{path} was taken with {old['device']}, {old['versions']}; give another --out.")
        self._rows: dict[str, Any] = old["rows"]
        for row in self._rows.values():
            row.setdefault("commit", old.get("commit", "unknown"))
        self._head = here

    def keep(self, name: str, row: dict[str, Any]) -> None:
        of, share = (WORK[name].goal_share if name in WORK else None) or ("", 0.0)
        if of in self._rows:
            goal = round(share * self._rows[of]["value"], 1)
            row |= {"goal": goal, "is_goal_met": row["value"] >= goal}
        self._rows[name] = row | {"commit": self._commit}
        share = "" if row["floor_ratio"] is None else f"{row['floor_ratio']:.0%} of the floor, "
        print(f"{name}: {row['value']} {row['unit']} ({share}goal {row['goal']})", flush=True)
        ordered = sorted(self._rows, key=lambda key: [x.zfill(4) for x in key[1:].split(".")])
        self._path.parent.mkdir(parents=True, exist_ok=True)
        whole = self._head | {"rows": {key: self._rows[key] for key in ordered}}
        self._path.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", default=",".join([*WORK, *PARTS, "P28"]), help="comma-separated")
    parser.add_argument("--out", type=Path, default=RESULT, help="a record that is there is added to")
    parser.add_argument("--commit", default="", help="the commit measured, where git cannot say")
    given = parser.parse_args()
    asked = given.rows.split(",")
    unknown = [name for name in asked if name not in (*WORK, *PARTS, "P28")]
    if unknown:
        raise SystemExit(f"no such rows: {', '.join(unknown)}; there are {', '.join([*WORK, *PARTS, 'P28'])}")
    kept = Record(given.out, given.commit or commit())
    measure_works(asked, kept.keep)
    for row in PARTS:
        if row in asked:
            for key, found in measure_parts(row).items():
                kept.keep(key, found)
            gc.collect()
            torch.cuda.empty_cache()
    if "P28" in asked:
        kept.keep("P28", measure_host())


if __name__ == "__main__":
    main()
