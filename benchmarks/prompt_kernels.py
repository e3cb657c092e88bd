"""What do the kernels around a prompt's products cost on a GPU, and which way of running them is fastest?

Two parts. `attention`: few queries behind a long context, whole and shared out in several ways. `small`:
rotary positions with the cache write, norms and the gated activation, alone (bytes over the copy speed) and
where they run, between the products of some blocks of an 8B model.
Everything is captured in a graph over inputs larger than the L2; medians; every way is checked before it is
timed, and what differs from the definition is named and left out.

    python benchmarks/prompt_kernels.py OUT.json [attention] [small]      # both; about half a minute each
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from tune_matmul import SHAPES

from slipstream.kernels.gpu import gated_activation as gates
from slipstream.kernels.gpu import paged_prefill as prefill
from slipstream.kernels.gpu import rms_norm as norms
from slipstream.kernels.gpu.rotary_store import rotary_store
from slipstream.kernels.paged_decode import NUM_COUNTERS
from slipstream.kernels.paged_prefill import paged_prefill as prefill_definition
from slipstream.kernels.query_tiles import tile_queries
from slipstream.kernels.rms_norm import add_rms_norm as norm_definition
from slipstream.kernels.rotary_store import rotary_store as rotary_definition
from slipstream.kernels.silu_and_mul import silu_and_mul as gate_definition

PAGE = 32
WORKERS = 12
REPLAYS = 12
# Bytes that a graph's inputs must exceed together: twice the L2 of an H100.
PAST_L2 = 100 << 20
# Of values of a size of 1 to 4, rounded to bfloat16 once more or once less.
TOLERANCE = 4e-2

# name: queries, length, heads, kv heads, head size, width of the table in tokens.
SPANS = {
    "8B, 64 behind 4,096": (64, 4160, 32, 8, 128, 8192),
    "0.6B, 64 behind 4,096": (64, 4160, 16, 8, 128, 8192),
    "8B, 16 behind 16,384": (16, 16400, 32, 8, 128, 32768),
    "8B, 256 behind 16,128": (256, 16384, 32, 8, 128, 33280),
    "8B, 256 behind 32,512": (256, 32768, 32, 8, 128, 33280),
    "8B, 512 behind 4,096": (512, 4608, 32, 8, 128, 8192),
    "8B, 128 alone": (128, 128, 32, 8, 128, 8192),
    "8B, 2,048 alone": (2048, 2048, 32, 8, 128, 8192),
}
# Of (lines, keys, warps, stages): how tiles of all keys may run; the first is how they did at first.
WHOLE = [(64, 64, 4, 2), (64, 64, 4, 5), (64, 32, 4, 5), (64, 64, 8, 5), (128, 64, 8, 5)]
# The same with (programs on a multiprocessor, shortest share).
SHARED = [
    (64, 64, 4, 2, 2, 512),
    (64, 64, 4, 5, 2, 512),
    (64, 64, 4, 5, 2, 256),
    (64, 64, 4, 5, 4, 256),
    (64, 32, 4, 5, 3, 256),
    (64, 32, 4, 7, 2, 512),
    (64, 64, 8, 5, 2, 512),
    (128, 64, 8, 5, 1, 512),
    (128, 64, 8, 5, 1, 256),
    (128, 64, 8, 5, 2, 512),
    (128, 32, 8, 7, 1, 512),
]
# No program on a multiprocessor is wanted where nothing is to be shared out.
CUTS = [prefill.Cut(*one, 0, 1) for one in WHOLE] + [prefill.Cut(*one) for one in SHARED]
GATES = [
    gates.Way(block, warps, lines_first, last_first, hint)
    for block, warps in ((1024, 4), (2048, 4), (2048, 8), (4096, 8))
    for lines_first, last_first in ((True, False), (False, False), (False, True), (True, True))
    for hint in ("", "evict_first")
]
NORMS = [
    norms.Way(lines, warps, hint)
    for lines, warps in ((1, 0), (1, 4), (1, 16), (2, 8), (2, 16), (4, 16))
    for hint in ("", "evict_first")
]
# Heads at once, warps.
ROTARIES = [(8, 2), (8, 4), (16, 4), (16, 8), (32, 4), (32, 8), (64, 8)]
TOKENS = (2048, 512)


def graph_us(calls: list[Callable[[], Any]]) -> float:
    """Return the median time of one of some calls that are replayed as one graph."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(calls))
    return statistics.median(times[2:])


def copy_speed() -> float:
    """Return how many bytes a second the device reads and writes when it copies."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    us = graph_us([lambda: target.copy_(source)] * 4)
    return 2 * source.numel() / us * 1e6


def is_near(given: torch.Tensor, expected: torch.Tensor) -> bool:
    error = (given.float() - expected.float()).abs() / expected.float().abs().clamp_min(1.0)
    return bool(given.isfinite().all()) and float(error.max()) <= TOLERANCE


class Span:
    """One row of queries behind a context, with as many layers of pages as exceed the L2."""

    def __init__(self, queries: int, length: int, heads: int, kv_heads: int, size: int, width: int) -> None:
        self.queries, self.length, self.heads, self.size = queries, length, heads, size
        self.bytes = 2 * 2 * length * kv_heads * size
        self.operations = 4 * queries * (length - queries / 2) * heads * size
        layers = max(2, math.ceil(PAST_L2 / self.bytes))
        blocks = -(-length // PAGE)
        shape = (blocks + 1, 2, PAGE, kv_heads, size)
        self.pages = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(layers)]
        self.table = torch.zeros(1, width // PAGE, dtype=torch.int32, device="cuda")
        self.table[0, :blocks] = torch.randperm(blocks, device="cuda").int() + 1
        self.q = torch.randn(queries, heads, size, device="cuda", dtype=torch.bfloat16)
        self.lens = torch.tensor([length], device="cuda")
        self.start = torch.tensor([0, queries], device="cuda")
        step = tile_queries(self.q.dtype)
        tiles = [(0, at) for at in reversed(range(0, queries, step))]
        self.tiles = torch.tensor(tiles, dtype=torch.int32, device="cuda")
        self.counters = torch.zeros(NUM_COUNTERS, dtype=torch.int32, device="cuda")

    def attend(self, layer: int, cut: prefill.Cut | None) -> torch.Tensor:
        out = torch.empty_like(self.q)
        where = (self.table, self.lens, self.start, self.tiles, out, self.size**-0.5, 0, 0.0)
        prefill.paged_prefill(self.q, self.pages[layer], *where, self.counters, cut)
        return out

    def expected(self) -> torch.Tensor:
        out = torch.empty(self.q.shape, device="cuda")
        where = (self.table, self.lens, self.start, self.tiles, out, self.size**-0.5, 0, 0.0)
        prefill_definition(self.q.float(), self.pages[0], *where)
        return out

    def time_us(self, cut: prefill.Cut | None) -> float:
        count = len(self.pages) * max(1, 12 // len(self.pages))
        return graph_us([functools.partial(self.attend, i % len(self.pages), cut) for i in range(count)])


def describe(cut: prefill.Cut | None) -> str:
    if cut is None:
        return "as it is"
    shape = f"{cut.lines} lines, {cut.keys} keys, {cut.warps} warps, {cut.stages} stages"
    return f"{shape}, shares of {cut.shortest}, {cut.per_sm} on a multiprocessor" if cut.per_sm else shape


def time_attention(speed: float) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, fields in SPANS.items():
        span = Span(*fields)
        want = span.expected()
        times: dict[str, float] = {}
        # So many queries are never shared out.
        cuts = CUTS if span.queries <= 512 else CUTS[: len(WHOLE)]
        for cut in (None, *cuts):
            given = span.attend(0, cut)
            if not is_near(given, want) or not torch.equal(given, span.attend(0, cut)):
                print(f"WRONG: {name}, {describe(cut)}", flush=True)
            elif not bool(span.counters.any()):
                times[describe(cut)] = span.time_us(cut)
        floor = max(span.bytes / speed, span.operations / 800e12) * 1e6
        now, first = (times.get(describe(cut), math.nan) for cut in (None, CUTS[0]))
        print(f"{name}: floor {floor:.1f} us, as it is {now:.1f}, as it was at first {first:.1f}")
        for way in sorted(times, key=times.__getitem__)[:5]:
            print(
                f"    {times[way]:.1f} us, {span.operations / times[way] / 1e6:.0f} TFLOP/s: {way}",
                flush=True,
            )
        found[name] = {"floor_us": floor, "us": times}
    return found


@dataclasses.dataclass
class Small:
    """One small kernel alone: a call on input i of several, its bytes, its ways and what it should give."""

    count: int
    bytes: int
    call: Callable[[int, Any], Any]
    expected: Callable[[], list[torch.Tensor]]
    ways: list[Any]


def make_small(tokens: int) -> Iterator[tuple[str, Small]]:
    """Yield the small kernels of an 8B block of so many tokens. Inputs are made when asked for."""
    (qkv_size, hidden, _), _, (mixed, _, _), _ = SHAPES["Llama-3.1-8B"][:4]

    def rows(count: int, size: int) -> list[torch.Tensor]:
        return [torch.randn(tokens, size, device="cuda").bfloat16() for _ in range(count)]

    def count_of(num_bytes: int) -> int:
        return max(2, math.ceil(PAST_L2 / num_bytes))

    total = 3 * tokens * mixed
    x = rows(count_of(total), mixed)
    yield (
        "gate",
        Small(len(x), total, lambda i, w: gates.gated_activation(x[i], gates.SILU, w),
              lambda: [gate_definition(x[0].float())], GATES),
    )  # fmt: skip
    total = 8 * tokens * hidden
    y, residual = rows(count_of(total), hidden), rows(count_of(total), hidden)
    weight = torch.rand(hidden, device="cuda")
    yield (
        "add and norm",
        Small(len(y), total, lambda i, w: norms.add_rms_norm(y[i], residual[i], weight, 1e-5, w),
              lambda: list(norm_definition(y[0].float() + residual[0].float(), torch.zeros_like(y[0]).float(),
                                           weight, 1e-5)), NORMS),
    )  # fmt: skip
    total = 4 * tokens * qkv_size
    qkv = rows(count_of(total), qkv_size)
    cache = Rotated(tokens)
    yield (
        "rotary and store",
        Small(len(qkv), total, lambda i, w: rotary_store(qkv[i], *cache.arguments, *w),
              lambda: [rotary_definition(qkv[0].float(), *cache.arguments)], ROTARIES),
    )  # fmt: skip


class Rotated:
    """Where the q, k and v of an 8B block go."""

    def __init__(self, tokens: int) -> None:
        pages = torch.zeros(tokens // PAGE + 1, 2, PAGE, 8, 128, device="cuda", dtype=torch.bfloat16)
        table = torch.randn(tokens, 2, 128, device="cuda")
        positions = torch.arange(tokens, device="cuda")
        self.arguments = (table, positions, None, None, 0.0, False, 32, pages, positions + PAGE)


def time_small(speed: float, tokens: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, small in make_small(tokens):
        want = small.expected()
        times: dict[str, float] = {}
        for way in small.ways:
            given = small.call(0, way)
            given = list(given) if isinstance(given, tuple) else [given]
            if not all(is_near(one, other) for one, other in zip(given, want, strict=True)):
                print(f"WRONG: {name}, {way}", flush=True)
                continue
            calls = [functools.partial(small.call, i, way) for i in range(small.count)]
            times[str(way)] = graph_us(calls * max(1, 8 // small.count))
        floor = small.bytes / speed * 1e6
        print(
            f"{tokens} tokens, {name} alone: floor {floor:.1f} us; {next(iter(times.values())):.1f} as first"
        )
        for way in sorted(times, key=times.__getitem__)[:3]:
            print(f"    {times[way]:.1f} us, {floor / times[way]:.0%} of the copy speed: {way}", flush=True)
        found[name] = {"floor_us": floor, "us": times}
    return found


class Blocks:
    """Some blocks of an 8B model but for attention, and a prompt's step through them."""

    def __init__(self, tokens: int, count: int = 3) -> None:
        self.count = count
        self.weights = [
            [
                torch.randn(o, i, device="cuda").mul_(i**-0.5).bfloat16()
                for o, i, _ in SHAPES["Llama-3.1-8B"][:4]
            ]
            for _ in range(count)
        ]
        hidden = self.weights[0][0].shape[1]
        self.x = torch.randn(tokens, hidden, device="cuda").bfloat16()
        self.norm = torch.ones(hidden, device="cuda")
        self.cache = Rotated(tokens)

    def step(self, gate: Any, norm: Any, rotary: Any, *, sums_inside: bool = False) -> torch.Tensor:
        """Run the blocks; None leaves a small kernel out, and something of its shape takes its place."""
        x = ready = self.x
        linear = torch.nn.functional.linear
        for qkv_w, output_w, gate_up_w, down_w in self.weights:
            qkv = linear(ready, qkv_w)
            q = qkv[:, : output_w.shape[1]]
            if rotary is not None:
                q = rotary_store(qkv, *self.cache.arguments, *rotary).flatten(1)
            x, ready = self.summed(q, output_w, x, norm, sums_inside)
            mixed = linear(ready, gate_up_w)
            mixed = (
                mixed[:, : down_w.shape[1]]
                if gate is None
                else gates.gated_activation(mixed, gates.SILU, gate)
            )
            x, ready = self.summed(mixed, down_w, x, norm, sums_inside)
        return x

    def summed(
        self, x: torch.Tensor, w: torch.Tensor, residual: torch.Tensor, norm: Any, inside: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if norm is None:
            return residual, torch.nn.functional.linear(x, w)
        if inside:
            # Into a new tensor once, since the first residual is the graph's input.
            total = residual.clone() if residual is self.x else residual
            total = total.addmm_(x, w.t())
            return total, norms.rms_norm(total, self.norm, 1e-5)
        ready, total = norms.add_rms_norm(torch.nn.functional.linear(x, w), residual, self.norm, 1e-5, norm)
        return total, ready

    def time_us(self, *ways: Any, sums_inside: bool = False) -> float:
        return graph_us([lambda: self.step(*ways, sums_inside=sums_inside)]) / self.count


def time_blocks(tokens: int) -> dict[str, Any]:
    """Return what each small kernel adds to a block, in each of its ways, the others as they are."""
    blocks = Blocks(tokens)
    first = (gates.WAY, norms.WAY, ROTARIES[2])
    base = blocks.time_us(*first)
    inside = blocks.time_us(*first, sums_inside=True)
    print(f"{tokens} tokens, a block but for attention: {base:.1f} us; sums inside the products {inside:.1f}")
    found: dict[str, Any] = {"us": base, "sums_inside_us": inside}
    for place, (name, ways) in enumerate(
        (("gate", GATES), ("two adds and norms", NORMS), ("rotary", ROTARIES))
    ):
        without = blocks.time_us(*first[:place], None, *first[place + 1 :])
        adds = {str(w): blocks.time_us(*first[:place], w, *first[place + 1 :]) - without for w in ways}
        print(f"  {name} adds {adds[str(first[place])]:.1f} us as it is")
        for way in sorted(adds, key=adds.__getitem__)[:4]:
            print(f"    {adds[way]:.1f} us: {way}", flush=True)
        found[name] = {"without_us": without, "adds_us": adds}
    return found


def compile_share(worker: int, parts: list[str]) -> None:
    """Compile what this worker is to compile: the cache on disk then has it for the run."""
    jobs: list[Callable[[], Any]] = []
    spans = list(SPANS.values())[:2] if "attention" in parts else []
    for span in [Span(*fields) for fields in spans]:
        jobs += [functools.partial(span.attend, 0, cut) for cut in (None, *CUTS)]
    for _, small in make_small(256) if "small" in parts else ():
        jobs += [functools.partial(small.call, 0, way) for way in small.ways]
    for job in jobs[worker::WORKERS]:
        job()
    torch.cuda.synchronize()


def main() -> None:
    if sys.argv[1] == "--compile":
        compile_share(int(sys.argv[2]), sys.argv[3:])
        return
    started, parts = time.monotonic(), sys.argv[2:] or ["attention", "small"]
    unknown = set(parts) - {"attention", "small"}
    if unknown:
        raise SystemExit(f"unknown part {sorted(unknown)[0]!r}; there are 'attention' and 'small'")
    torch.manual_seed(0)
    arguments = [sys.executable, __file__, "--compile"]
    workers = [subprocess.Popen([*arguments, str(i), *parts]) for i in range(WORKERS)]
    codes = [worker.wait() for worker in workers]
    if any(codes):
        raise SystemExit("a kernel did not compile; what it said is above")
    speed = copy_speed()
    print(
        f"compiled after {time.monotonic() - started:.0f} s; a copy runs at {speed / 1e12:.2f} TB/s",
        flush=True,
    )
    record: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "copy": speed,
    }
    if "attention" in parts:
        record["attention"] = time_attention(speed)
    if "small" in parts:
        record["small"] = {tokens: time_small(speed, tokens) for tokens in TOKENS}
        record["blocks"] = {tokens: time_blocks(tokens) for tokens in TOKENS}
    Path(sys.argv[1]).write_text(json.dumps(record, indent=1), encoding="utf-8")
    print(f"done after {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
