"""What does a sampled step cost a GPU and its host beside a greedy one? Kernels alone, then whole steps.

Kernels run in captured graphs over logits that rotate through more than the cache holds; beside each stands
what the same costs by tensor operations, and the time in which its bytes cross memory. The nucleus is drawn
from random logits (std 2: 25,000 candidates of 128,256), flatter ones (std 1.3) and peaked ones, and compared
with the order's token by token. A whole step is `Sampler.sample` and the copy to the host.

    python benchmarks/sampling_kernels.py [--rows 1,64,256] [--tune] [--out sampling_kernels.json]
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from graph_timing import replayed_us

from slipstream.core.sampling_params import RowSampling
from slipstream.kernels.gpu import leaders as leader_file
from slipstream.kernels.gpu import nucleus
from slipstream.kernels.gpu.row_logprobs import row_logprobs
from slipstream.sampling import candidates
from slipstream.sampling.filters import FilterParams, draw_top_p_in_order
from slipstream.sampling.logprobs import pack_logprobs
from slipstream.sampling.penalties import PenaltyTables
from slipstream.sampling.sampler import Sampler
from slipstream.sampling.weights import scale_bits

VOCAB = 128_256
BITS = scale_bits(VOCAB)
ROTATED_BYTES = 300 << 20
COPY_BYTES_PER_S = 3.02e12
PROMPT, STEPS = 192, 60
KINDS = {"std 2": (2.0, 0.0), "std 1.3": (1.3, 0.0), "peaked": (2.0, 9.0)}
SAMPLED: dict[str, Any] = {"temperature": 0.8, "top_p": 0.95}
WORK = {
    "greedy": RowSampling(),
    "sampled": RowSampling(**SAMPLED),
    "sampled, repetition penalty": RowSampling(**SAMPLED, repetition_penalty=1.1),
    "sampled, logprobs 5": RowSampling(**SAMPLED, logprobs=5),
    "P25": RowSampling(**SAMPLED, repetition_penalty=1.1, logprobs=5),
    "min_p": RowSampling(temperature=0.8, min_p=0.02),
    "top_k 50": RowSampling(temperature=0.8, top_k=50),
    "logit_bias": RowSampling(**SAMPLED, logit_bias=tuple((token, 1.0) for token in range(20))),
    "min_tokens": RowSampling(**SAMPLED, min_tokens=4000, stop_ids=(1, 2)),
    "bad_token_ids": RowSampling(**SAMPLED, bad_ids=tuple(range(20))),
}


def graph_us(calls: list[Callable[[], Any]], repeats: int = 7) -> float:
    """Return the median time of one call of a captured run over all of them."""
    calls[0]()
    return replayed_us(lambda: [call() for call in calls], count=len(calls), runs=repeats)


def plain_us(call: Callable[[], Any], repeats: int = 3) -> float:
    """Return the median time of a call that cannot be captured."""
    call()
    times: list[float] = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return statistics.median(times)


def logits_of(kind: str, rows: int) -> list[torch.Tensor]:
    copies = max(2, min(160, ROTATED_BYTES // (4 * rows * VOCAB)))
    scale, peak = KINDS[kind]
    generator = torch.Generator("cuda").manual_seed(rows)
    made = [torch.randn(rows, VOCAB, device="cuda", generator=generator) * scale for _ in range(copies)]
    for x in made:
        x[:, 1000:1040] += peak
        x.copy_(x.bfloat16().float())
    return made


def params_of(rows: int) -> tuple[FilterParams, torch.Tensor]:
    def full(value: float, dtype: torch.dtype) -> torch.Tensor:
        return torch.full((rows,), value, dtype=dtype, device="cuda")

    generator = torch.Generator("cuda").manual_seed(5)
    uniform = torch.rand(rows, dtype=torch.float64, device="cuda", generator=generator)
    none = full(0, torch.int64)
    return FilterParams(
        full(0.8, torch.float32), full(0.95, torch.float64), full(0, torch.float64), none
    ), uniform


def show(name: str, rows: int, us: float, num_bytes: float, others: dict[str, float]) -> dict[str, Any]:
    floor = num_bytes / COPY_BYTES_PER_S * 1e6
    shown = "".join(f"   {other}: {value:.0f}" for other, value in others.items())
    print(f"{name:<30}{rows:>5}{us:>10.1f}{floor:>10.1f}{shown}", flush=True)
    return {"what": name, "rows": rows, "us": us, "bytes_once_us": floor, "others_us": others}


def nucleus_calls(rows: int, made: list[torch.Tensor], capacity: int) -> list[Callable[[], Any]]:
    params, uniform = params_of(rows)

    def call(x: torch.Tensor) -> torch.Tensor:
        columns = (params.temperature_N, params.top_p_N, None, uniform)
        return nucleus.draw_nucleus(x, *columns, bits=BITS, capacity=capacity)[0]

    return [lambda x=x: call(x) for x in made]


def measure_nucleus(rows: int) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for kind in KINDS:
        made = logits_of(kind, rows)
        params, uniform = params_of(rows)
        expected = draw_top_p_in_order(made[0].clone(), uniform, params)
        calls = nucleus_calls(rows, made, nucleus.CAPACITY)
        assert torch.equal(calls[0](), expected), (kind, rows)
        others = {}
        if kind == "std 2":
            others["by order"] = plain_us(lambda: draw_top_p_in_order(made[0], uniform, params))  # noqa: B023
        num_bytes = 4 * rows * VOCAB
        found.append(show(f"nucleus, {kind}", rows, graph_us(calls), num_bytes, others))
    return found


def measure_passes(rows: int) -> list[dict[str, Any]]:
    """Time what reads the vocabulary once: the leaders, the greatest, masses and ranks, a copy."""
    made = logits_of("std 2", rows)
    num_bytes = 4 * rows * VOCAB
    by_tensors: list[Callable[[], Any]] = []
    has_kernels = candidates.has_kernels
    candidates.has_kernels = lambda x, k: False
    by_tensors = [lambda x=x: candidates.leading(x, 5) for x in made]
    expected = candidates.leading(made[0], 5)
    tensors_us = graph_us(by_tensors)
    candidates.has_kernels = has_kernels
    given = leader_file.leaders(made[0], 5)
    assert torch.equal(given[1], expected[1]) and torch.equal(given[0], expected[0])
    found = [
        show(
            "5 leaders",
            rows,
            graph_us([lambda x=x: leader_file.leaders(x, 5) for x in made]),
            num_bytes,
            {"by tensors": tensors_us},
        )
    ]
    maxima = {
        "max with its place, by tensors": graph_us([lambda x=x: x.max(-1) for x in made]),
        "amax": graph_us([lambda x=x: x.amax(-1) for x in made]),
    }
    one = graph_us([lambda x=x: leader_file.leaders(x, 1) for x in made])
    found.append(show("1 leader", rows, one, num_bytes, maxima))
    tokens = torch.arange(rows, device="cuda") * 7
    status = torch.zeros(rows, dtype=torch.int8, device="cuda")
    listed = [(x, leader_file.leaders(x, 5)) for x in made]
    packed = pack_logprobs(made[0], tokens, status, num_top=5)
    logs = made[0][:8].double().log_softmax(-1).gather(1, tokens[:8, None])
    assert float((packed[:8, 1:2] - logs).abs().max()) < 1e-5
    masses = graph_us(
        [
            lambda x=x, top=top: row_logprobs(x, tokens, status, top[0][:, 0], top, bits=BITS)
            for x, top in listed
        ]
    )
    found.append(show("logprobs and ranks", rows, masses, num_bytes, {}))
    copied = graph_us([lambda x=x: x.clone() for x in made])
    found.append(show("a copy (not made any more)", rows, copied, 2 * num_bytes, {}))
    return found


def measure_penalties(rows: int) -> dict[str, Any]:
    tables = PenaltyTables(max_rows=rows, vocab_size=VOCAB, device=torch.device("cuda"))
    generator = torch.Generator().manual_seed(3)
    draws = [torch.randint(0, VOCAB, (PROMPT,), generator=generator).tolist() for _ in range(rows)]
    slots = torch.tensor([tables.claim(tokens, PROMPT // 2) for tokens in draws], device="cuda")
    index = torch.arange(rows, device="cuda")
    asked = tuple(torch.full((rows,), value, device="cuda") for value in (1.1, 0.3, 0.2))
    names = dict(zip(("repetition_P", "presence_P", "frequency_P"), asked, strict=True))
    made = logits_of("std 2", rows)
    given, expected = made[0].clone(), made[0].clone()
    undo = tables.penalise(given, index, slots, **names)
    tables.penalise_by_tensors(expected, index, slots, *asked)
    assert torch.equal(given, expected) and not torch.equal(given, made[0])
    undo()
    assert torch.equal(given, made[0])
    calls = [lambda x=x: tables.penalise(x, index, slots, **names)() for x in made]
    tensors = [lambda x=x: tables.penalise_by_tensors(x.clone(), index, slots, *asked) for x in made]
    others = {"by tensors, with a copy of the logits": graph_us(tensors)}
    return show("penalties and back", rows, graph_us(calls), 5 * 8 * rows * PROMPT, others)


def measure_step(name: str, rows: int) -> dict[str, Any]:
    """Time whole steps of the sampler; edits that nobody takes back stay in the logits from step to step."""
    sampler = Sampler(max_rows=rows, vocab_size=VOCAB, device="cuda")
    generator = torch.Generator().manual_seed(3)
    started = time.perf_counter()
    for row in range(rows):
        tokens = torch.randint(0, VOCAB, (PROMPT,), generator=generator).tolist()
        sampler.add(row, WORK[name], tokens, PROMPT, row, 0)
    torch.cuda.synchronize()
    admission_ms = (time.perf_counter() - started) * 1e3
    made, numbers = logits_of("std 1.3", rows)[:2], list(range(rows))

    def step(count: int) -> Any:
        with torch.inference_mode():
            output = sampler.sample(made[count % 2], numbers)
            output.start_copy()
        return output

    for count in range(6):
        step(count).tokens()
    host: list[float] = []
    outputs: list[Any] = []
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for count in range(STEPS):
        began = time.perf_counter()
        outputs.append(step(count))
        host.append((time.perf_counter() - began) * 1e3)
    end.record()
    end.synchronize()
    device_ms = start.elapsed_time(end) / STEPS
    began = time.perf_counter()
    for output in outputs:
        output.tokens()
        output.statuses()
        output.logprobs_by_row()
    collect_ms = (time.perf_counter() - began) * 1e3 / STEPS
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step(0).tokens()
        torch.cuda.synchronize()
    kernels = {event.key: event for event in profile.key_averages()}
    count = sum(event.count for event in kernels.values())
    busy_us = sum(event.device_time_total for event in kernels.values())
    host_ms = statistics.median(host)
    print(
        f"{name:<30}{rows:>5}{device_ms:>10.3f}{busy_us / 1e3:>10.3f}{host_ms:>10.3f}{collect_ms:>10.3f}"
        f"{count:>8}{admission_ms:>10.1f}",
        flush=True,
    )
    leading = sorted(kernels.values(), key=lambda event: -event.device_time_total)[:12]
    return {
        "what": name,
        "rows": rows,
        "ms_per_step": device_ms,
        "kernels_ms": busy_us / 1e3,
        "launch_host_ms": host_ms,
        "collect_host_ms": collect_ms,
        "admission_host_ms": admission_ms,
        "num_kernels": count,
        "kernels_us": {event.key[:90]: [event.count, round(event.device_time_total, 1)] for event in leading},
    }


def tune(rows: int) -> list[dict[str, Any]]:
    """Time the nucleus by its constants."""
    found: list[dict[str, Any]] = []
    shapes = [(4, 1024, 8, 128), (2, 1024, 8, 128), (4, 1024, 8, 255), (4, 2048, 16, 64), (2, 2048, 16, 64)]
    for shape, capacity in itertools.product(shapes, (4096, 8192, 16384)):
        nucleus.LINES, nucleus.WIDTH, nucleus.WARPS, nucleus.MAX_REGISTERS = shape
        for kind in KINDS:
            us = graph_us(nucleus_calls(rows, logits_of(kind, rows), capacity), repeats=3)
            name = f"{kind} {shape} {capacity}"
            found.append(show(name, rows, us, 4 * rows * VOCAB, {}))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", default="1,64,256")
    parser.add_argument("--tune", action="store_true", help="time the nucleus by its constants, at 256 rows")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    report: dict[str, Any] = {"device": torch.cuda.get_device_name(), "kernels": [], "steps": []}
    print(f"{'kernel':<30}{'rows':>5}{'us':>10}{'bytes us':>10}")
    for rows in map(int, args.rows.split(",")):
        report["kernels"] += [*measure_nucleus(rows), *measure_passes(rows), measure_penalties(rows)]
    head = "".join(f"{name:>10}" for name in ("ms", "busy ms", "launch", "collect"))
    print(f"{'step':<30}{'rows':>5}{head}{'kernels':>8}{'admit':>10}")
    most = max(map(int, args.rows.split(",")))
    for rows, name in itertools.product(map(int, args.rows.split(",")), WORK):
        if rows < most and name not in ("greedy", "P25"):
            continue
        report["steps"].append(measure_step(name, rows))
    last = next(step for step in reversed(report["steps"]) if step["what"] == "P25")
    for kernel, (count, us) in last["kernels_us"].items():
        print(f"{us:>10.1f} us in {count:>3}  {kernel}")
    if args.tune:
        report["tuned"] = tune(256)
    if args.out is not None:
        args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
