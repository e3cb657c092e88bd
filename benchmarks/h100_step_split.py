"""Where does the time of a row of the H100 benchmark go, kernel by kernel, and at which clock?

Each row's work runs as in `h100.py`: some calls for the time, while the card's clock and power are read, and
one under the profiler. Kernels overlap the ones before them, so what counts of a kernel is from the end of
all earlier ones (or its start, if that is later) to its own: these shares and the gaps add up to the time
between the first kernel and the last. "prompts" is what ends before the last kernel of a prompt's attention
has, "decoding" the rest; "host" is what of an unprofiled call lies outside all of it.
Invariant: the profiled call is told apart from the timed ones, for a profiler costs time.

    python benchmarks/h100_step_split.py [--rows P3,P9] [--out benchmarks/results/h100_step_split.json]
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import subprocess
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import h100_parts
import torch
from gpu_spans import Span, spans_of
from h100 import engine_of, requests_of, start, versions
from h100_rows import WORK, Work

from slipstream import LLM

RESULT = Path(__file__).parent / "results" / "h100_step_split.json"
RUNS, NAMED = 3, 14
LONG_GAP_MS = 0.03
QUERY = [
    "nvidia-smi", "--query-gpu=clocks.sm,power.draw.instant", "--format=csv,noheader,nounits", "-lms", "20",
]  # fmt: skip
# The card is warm, and its meter read, after so long.
LEAST_S = 1.5
# Rows that are no plain work: options of the engine, cached prompt tokens, own ones, output.
OTHERS: dict[str, tuple[dict[str, Any], int, int, int]] = {
    "P19.warm": ({"reuse": True}, h100_parts.SHARED, h100_parts.OWN, 1),
    "P27.ttft": ({"reuse": True, "max_seq_len": 33280}, 0, h100_parts.LONG, 1),
    "P27.b1": ({"reuse": True, "max_seq_len": 33280}, h100_parts.LONG, 16, 65),
}


class Card:
    """The clock and power of the card while something runs."""

    def __init__(self) -> None:
        self.seen: list[tuple[float, float]] = []
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._read, daemon=True)

    def __enter__(self) -> Card:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._is_over.set()
        self._thread.join()

    def _read(self) -> None:
        with subprocess.Popen(QUERY, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if self._is_over.is_set():
                    break
                clock, power = (part.strip() for part in line.split(","))
                self.seen.append((float(clock), float(power)))
            process.terminate()

    def describe(self) -> dict[str, float]:
        """Return the median clock in MHz and power in W of the busier half, or nothing."""
        busy = sorted(self.seen, key=lambda one: -one[1])[: max(1, len(self.seen) // 2)]
        if not self.seen:
            return {}
        clock, power = (statistics.median(column) for column in zip(*busy, strict=True))
        return {"sm_mhz": clock, "watts": power, "readings": len(self.seen)}


def shares(spans: Sequence[Span]) -> dict[str, Any]:
    """Return what each kernel takes of the time from the first to the last, and the gaps between them.

    Of the longest gaps: ms, when, and the kernel that followed.
    """
    taken: dict[str, float] = defaultdict(float)
    calls: Counter[str] = Counter()
    gaps, end, longest = 0.0, spans[0][0] if spans else 0.0, []
    for first, last, name in spans:
        gaps += max(0.0, first - end)
        if first > end + LONG_GAP_MS:
            longest.append((round(first - end, 3), round(end - spans[0][0], 2), name[:40]))
        taken[name] += max(0.0, last - max(first, end))
        calls[name] += 1
        end = max(end, last)
    leading = sorted(taken.items(), key=lambda one: -one[1])[:NAMED]
    kernels = {name[:90]: {"ms": round(ms, 3), "calls": calls[name]} for name, ms in leading}
    rest = sum(taken.values()) - sum(ms for _, ms in leading)
    whole = end - spans[0][0] if spans else 0.0
    return {
        "ms": round(whole, 3),
        "gaps_ms": round(gaps, 3),
        "others_ms": round(rest, 3),
        "kernels": kernels,
        "longest_gaps": sorted(longest)[: -NAMED - 1 : -1],
    }


def split(llm: LLM, call: Callable[[], None]) -> dict[str, Any]:
    """Time some calls, then look into one; `call` is whole and blocks."""
    call()
    call()
    times: list[float] = []
    before = dict(llm.get_stats())
    with Card() as card:
        while len(times) < RUNS or sum(times) < 1e3 * LEAST_S:
            started = time.perf_counter()
            call()
            times.append(1e3 * (time.perf_counter() - started))
    after = llm.get_stats()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        started = time.perf_counter()
        call()
        profiled = 1e3 * (time.perf_counter() - started)
        torch.cuda.synchronize()
    spans = spans_of(profile)
    ends = [end for _, end, name in spans if "prefill" in name]
    border = max(ends, default=0.0)
    whole = shares(spans)
    counted = ("num_plans", "num_graph_steps", "num_late_graphs", "num_graphs")
    return {
        "call_ms": round(statistics.median(times), 3),
        "calls": len(times),
        "profiled_call_ms": round(profiled, 3),
        "card": card.describe(),
        "per_call": {key: (after[key] - before[key]) / len(times) for key in counted if key in after},
        "host_ms": round(statistics.median(times) - whole["ms"], 3),
        "all": {key: whole[key] for key in ("ms", "gaps_ms")},
        "prompts": shares([span for span in spans if span[1] <= border]),
        "decoding": shares([span for span in spans if span[1] > border]),
    }


def call_of(llm: LLM, name: str) -> Callable[[], None]:
    return plain_call(llm, name, WORK[name]) if name in WORK else other_call(llm, name)


def plain_call(llm: LLM, name: str, work: Work) -> Callable[[], None]:
    prompts, params = requests_of(llm, name, work)
    return lambda: llm.generate(prompts, params, use_tqdm=False, raise_on_error=True) and None


def other_call(llm: LLM, name: str) -> Callable[[], None]:
    _, cached, own, output = OTHERS[name]
    rng, vocab = random.Random(name), llm.startup.limits.vocab_size
    beginning = h100_parts.draw(rng, cached, vocab)

    def call() -> None:
        h100_parts.generate(llm, [beginning + h100_parts.draw(rng, own, vocab)], output)

    return call


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", default="P1,P3,P5,P25,P9,P11,P17,P18,P23,P19.warm,P27.ttft,P27.b1")
    parser.add_argument("--out", type=Path, default=RESULT)
    given = parser.parse_args()
    asked = given.rows.split(",")
    unknown = [name for name in asked if name not in (*WORK, *OTHERS)]
    if unknown:
        raise SystemExit(f"no such rows: {', '.join(unknown)}; there are {', '.join([*WORK, *OTHERS])}")
    rows: dict[str, Any] = {}
    # Rows of one engine one after the other, engines in the order in which rows name them.
    keys = [repr(engine_for(name)) for name in asked]
    for key in dict.fromkeys(keys):
        names = [name for name, own in zip(asked, keys, strict=True) if own == key]
        model, options = engine_for(names[0])
        with tempfile.TemporaryDirectory() as folder, start(model, Path(folder), **options) as llm:
            for name in names:
                rows[name] = split(llm, call_of(llm, name))
                show(name, rows[name])
                record = {"device": torch.cuda.get_device_name(), "versions": versions(), "rows": rows}
                given.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        gc.collect()
        torch.cuda.empty_cache()


def engine_for(name: str) -> tuple[str, dict[str, Any]]:
    """Return the model of a row and the options of its engine."""
    if name not in WORK:
        return "Llama-3.1-8B", OTHERS[name][0]
    model, policy, is_invariant = engine_of(name)
    return model, {"policy": policy, "batch_invariant": is_invariant}


def show(name: str, row: dict[str, Any]) -> None:
    print(
        f"{name}: {row['call_ms']} ms, host {row['host_ms']}, gaps {row['all']['gaps_ms']}, {row['card']}, "
        f"{row['per_call']}, profiled {row['profiled_call_ms']}"
    )
    for part in ("prompts", "decoding"):
        found = row[part]
        lines = [f"{k[:32]} {v['ms']} ({v['calls']})" for k, v in list(found["kernels"].items())[:9]]
        print(f"  {part} {found['ms']} ms, gaps {found['gaps_ms']}: {'; '.join(lines)}")
        print(f"    (gap, at, before) {found['longest_gaps'][:6]}", flush=True)


if __name__ == "__main__":
    main()
