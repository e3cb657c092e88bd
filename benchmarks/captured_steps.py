"""What does a captured step save, shape by shape, and does anything wait for a capture?

Random weights of Llama-3.1-8B's shapes in bfloat16 on one GPU, less than a minute. First the same plans by a
runner that launches kernel by kernel and by one that replays: time per step with two outstanding, and whether
the tokens agree (padding may take other tiles, so that bfloat16 may tell two equal tokens apart now and
then). Then the engine itself: its start, first tokens of prompts alone, and 256 requests that arrive a few at
a time, with how many captures happened while they ran (none is right).

Predicted for an H100, 8B: a step of 32 rows beside 256 tokens reads 14 GB of weights (4.6 ms) and computes
4.0 TFLOP (5.4 ms at 750 TFLOP/s): 8 ms captured with attention, 16 by kernels; beside 512 tokens 7.6 TFLOP
(10.1 ms): 13 captured; a prompt of 2,048 alone 3 ms less than before; 50 to 80 captures in the 4 s of a
start.

    python benchmarks/captured_steps.py [--device cuda] [--layers 32] [--out captured.json]
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections import deque
from pathlib import Path
from typing import Any

import torch
from h100_rows import LLAMA_8B

from slipstream import KvCacheConfig, SamplingParams
from slipstream.core.plan import RequestInit, Span, StepPlan
from slipstream.core.request import Request
from slipstream.core.sampling_params import RowSampling
from slipstream.engine.assembly import Assembly, assemble
from slipstream.engine.config import EngineConfig
from slipstream.engine.runner import Runner
from slipstream.engine.step_shapes import StepShape, StepShapes

CONTEXT, CHUNK_START, STEPS, WARM = 512, 8192, 24, 6
PAGES = 2600
# One-token rows, tokens of a prompt beside them (or alone), how many prompts share these.
CASES = [
    (1, 0, 0), (32, 0, 0), (64, 0, 0), (32, 256, 1), (32, 512, 1), (20, 230, 1), (64, 512, 4), (0, 128, 1),
    (0, 512, 1), (0, 1024, 1), (0, 2048, 1),
]  # fmt: skip


def make_runner(assembly: Assembly, shapes: StepShapes | None) -> Runner:
    """Return another runner of the same model, with pages of its own."""
    old, resolved = assembly.engine.runner, assembly.resolved
    assert isinstance(old, Runner)
    return Runner(
        old.model,
        old.groups,
        num_pages=PAGES,
        max_batch_size=256,
        max_seq_len=16384,
        kv_dtype=getattr(torch, resolved.kv_dtype),
        device=torch.device(resolved.device),
        backend=old.backend,
        shapes=shapes,
    )


def first_plan(case: tuple[int, int, int], block_tokens: int, vocab: int) -> StepPlan:
    """Admit the rows of a case, contexts and all, and run its first step."""
    rng, page = random.Random(0), 1
    rows, tokens, prompts = case
    plan = StepPlan(0)
    for row in range(rows + prompts):
        length = CONTEXT if row < rows else CHUNK_START + tokens if rows else tokens // prompts
        needed = -(-(length + STEPS + 1) // block_tokens)
        ids = [rng.randrange(vocab) for _ in range(length)]
        blocks = [list(range(page, page + needed))]
        page += needed
        plan.added.append(RequestInit(row, f"r{row}", ids, length, 0, blocks, RowSampling(), row, 0))
    assert page <= PAGES
    return plan


def next_plan(case: tuple[int, int, int], step: int) -> StepPlan:
    """Every one-token row goes on; a prompt alone is sampled once, beside rows it is a quiet piece."""
    rows, tokens, prompts = case
    spans = [Span(row, CONTEXT + step - 1, 1) for row in range(rows)]
    share = tokens // max(prompts, 1)
    spans += [Span(row, CHUNK_START if rows else 0, share) for row in range(rows, rows + prompts)]
    return StepPlan(step, spans=spans, sample=list(range(rows)))


def run_case(runner: Runner, case: tuple[int, int, int], vocab: int) -> tuple[float, list[Any]]:
    """Return the median seconds of a step, and the tokens of the first."""
    plan = first_plan(case, runner.groups[0].block_tokens, vocab)
    outstanding: deque[Any] = deque()
    times: list[float] = []
    found: list[Any] = []
    for step in range(STEPS):
        later = next_plan(case, step)
        later.added, later.removed = (plan.added, []) if step == 0 else ([], [])
        handle = runner.launch(later)
        runner.sample(handle)
        outstanding.append(handle)
        if len(outstanding) < 2:
            continue
        result = runner.collect(outstanding.popleft())
        assert not result.row_errors, result.row_errors
        times.append(time.perf_counter())
        found.append(result.tokens)
    while outstanding:
        runner.collect(outstanding.popleft())
    runner.launch(StepPlan(STEPS, removed=[init.row for init in plan.added]))
    gaps = [b - a for a, b in zip(times[WARM:-1], times[WARM + 1 :], strict=True)]
    return statistics.median(gaps), [found[0].get(row) for row in range(case[0])]


def compare(assembly: Assembly) -> list[dict[str, Any]]:
    vocab = assembly.limits.vocab_size
    eager = make_runner(assembly, None)
    plain = [run_case(eager, case, vocab) for case in CASES]
    eager.drop_pages()
    shapes = StepShapes.create((1, 32, 64), has_padding=True, max_num_tokens=8192, max_seq_len=16384)
    runner, found = make_runner(assembly, shapes), []
    for case, (plain_s, tokens) in zip(CASES, plain, strict=True):
        rows, count, prompts = case
        shape = next(shapes.serving(StepShape(rows, prompts, count)))
        started = time.perf_counter()
        runner.capture(shape)
        capture_s = time.perf_counter() - started
        step_s, again = run_case(runner, case, vocab)
        same = sum(a == b for a, b in zip(tokens, again, strict=True))
        line = {
            "rows": rows, "tokens": count, "prompts": prompts, "shape": list(shape),
            "kernel_by_kernel_ms": round(1e3 * plain_s, 3), "captured_ms": round(1e3 * step_s, 3),
            "capture_s": round(capture_s, 3), "same_tokens": f"{same} of {len(tokens)}",
        }  # fmt: skip
        print(json.dumps(line), flush=True)
        found.append(line)
    assert runner.counters["num_graph_steps"] == STEPS * len(CASES), "a case ran kernel by kernel"
    runner.drop_pages()
    return found


def request(assembly: Assembly, name: str, length: int, output: int) -> Request:
    rng = random.Random(name)
    ids = [rng.randrange(assembly.limits.vocab_size) for _ in range(length)]
    params = SamplingParams(max_tokens=output, ignore_eos=True, detokenize=False)
    return Request.create(ids, params, assembly.limits, request_id=name)


def first_tokens(assembly: Assembly) -> dict[str, float]:
    """Return the median time to the first token of prompts alone, in ms."""
    engine, found = assembly.engine, {}
    for length in (128, 600, 2048):
        times: list[float] = []
        for i in range(12):
            one = request(assembly, f"{length}-{i}", length, 1)
            started = time.perf_counter()
            engine.submit(one)
            while engine.has_work:
                engine.step()
            times.append(time.perf_counter() - started)
        found[f"first_token_{length}_ms"] = round(1e3 * statistics.median(times[4:]), 3)
    return found


def trickle(assembly: Assembly) -> dict[str, Any]:
    """256 requests of 128 in and 64 out, six arriving before each step."""
    engine, before = assembly.engine, dict(assembly.engine.runner.counters)
    waiting = deque(request(assembly, f"t{i}", 128, 64) for i in range(256))
    plans, started, tokens = engine.scheduler.stats.num_plans, time.perf_counter(), 0
    while waiting or engine.has_work:
        for _ in range(min(6, len(waiting))):
            engine.submit(waiting.popleft())
        tokens += sum(len(event.new_token_ids) for event in engine.step())
    seconds, after = time.perf_counter() - started, engine.runner.counters
    return {
        "tokens_per_s": round(tokens / seconds),
        "steps": engine.scheduler.stats.num_plans - plans,
        "captured_steps": after["num_graph_steps"] - before["num_graph_steps"],
        "captures_while_running": after["num_late_graphs"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        config = LLAMA_8B | {"num_hidden_layers": options.layers}
        (Path(folder) / "config.json").write_text(json.dumps(config), encoding="utf-8")
        cache = KvCacheConfig(max_tokens=65536, enable_block_reuse=False)
        settings = {"load_format": "dummy", "skip_tokenizer_init": True, "max_seq_len": 16384}
        assembly = assemble(
            EngineConfig(model=folder, device=options.device, kv_cache_config=cache, **settings)
        )
        for line in assembly.report:
            print(line, flush=True)
        record: dict[str, Any] = {"phases": assembly.phases, "start": dict(assembly.engine.runner.counters)}
        record |= {"first": first_tokens(assembly), "trickle": [trickle(assembly) for _ in range(3)]}
        print(json.dumps(record), flush=True)
        record["cases"] = compare(assembly)
    if options.out is not None:
        options.out.write_text(json.dumps(record, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
