"""How fast do prompts attend on a Hopper GPU, kernel by kernel, and is it right?

Attention of Llama-3.1-8B's shape (32 query heads, 8 of keys and values, heads of 128) over pages of 32
tokens, prompts alone and chunks behind a context; each kernel is checked against float32 on the same inputs,
then timed in a captured graph (median of the runs). TFLOP/s count what a causal mask leaves.

    python benchmarks/prefill_attention.py [--out prefill_attention.json]
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from graph_timing import replayed_us
from torch import Tensor

from slipstream.kernels.gpu.hopper_prefill import hopper_prefill
from slipstream.kernels.gpu.paged_prefill import CUT, paged_prefill
from slipstream.kernels.paged_decode import NUM_COUNTERS
from slipstream.kernels.query_tiles import tile_queries

HEADS, KV_HEADS, SIZE, PAGE = 32, 8, 128, 32
# (queries, length after them) of each row.
CASES: dict[str, list[tuple[int, int]]] = {
    "1 x 128": [(128, 128)],
    "64 x 128": [(128, 128)] * 64,
    "1 x 2048": [(2048, 2048)],
    "8 x 2048": [(2048, 2048)] * 8,
    "1 x 8192": [(8192, 8192)],
    "8192 at 32768": [(8192, 32768)],
    "256 at 8192": [(256, 8192)],
    "256 at 32768": [(256, 32768)],
    "64 at 4160": [(64, 4160)],
    "ragged": [(100, 1000), (777, 777), (2000, 5000), (31, 4000), (300, 300)],
}
VARIANTS: dict[str, Callable[..., None]] = {
    "as it is": lambda *a: paged_prefill(*a, counters()),
    "triton": lambda *a: paged_prefill(*a, counters(), cut=CUT),
    "hopper": hopper_prefill,
    "hopper, whole contexts": lambda *a: hopper_prefill(*a, wanted=1),
}
NUM_RUNS = 20


@functools.cache
def counters() -> Tensor:
    return torch.zeros(NUM_COUNTERS, dtype=torch.int32, device="cuda")


def inputs(rows: list[tuple[int, int]], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator("cuda").manual_seed(seed)
    blocks = [-(-length // PAGE) for _, length in rows]
    pages = sum(blocks) + 1
    kv = torch.randn(pages, 2, PAGE, KV_HEADS, SIZE, generator=generator, device="cuda", dtype=torch.bfloat16)
    kv[0] = float("nan")
    order = (torch.randperm(pages - 1, generator=generator, device="cuda") + 1).int()
    table = torch.zeros(len(rows), max(blocks) + 1, dtype=torch.int32, device="cuda")
    at = 0
    for row, (count, (_, length)) in enumerate(zip(blocks, rows, strict=True)):
        table[row, :count] = order[at : at + count]
        kv[order[at + count - 1].long(), :, length - (count - 1) * PAGE :] = float("nan")
        at += count
    starts = torch.tensor([0] + [n for n, _ in rows]).cumsum(0).cuda()
    lens = torch.tensor([length for _, length in rows]).cuda()
    step = tile_queries(torch.bfloat16)
    tiles = [(row, a) for row, (n, _) in enumerate(rows) for a in reversed(range(0, n, step))]
    tiles_M2 = torch.tensor(tiles, dtype=torch.int32).cuda()
    q = torch.randn(int(starts[-1]), HEADS, SIZE, generator=generator, device="cuda", dtype=torch.bfloat16)
    return [q, kv, table, lens, starts, tiles_M2, torch.full_like(q, float("nan"))]


def expected(q: Tensor, kv: Tensor, table: Tensor, n: int, length: int, window: int, cap: float) -> Tensor:
    position = torch.arange(length, device="cuda")
    found = kv[table[position // PAGE].long(), :, position % PAGE].float()
    k, v = (found[:, i].repeat_interleave(HEADS // KV_HEADS, 1) for i in range(2))
    scores = torch.einsum("tnh,lnh->ntl", q.float(), k) * SIZE**-0.5
    if cap:
        scores = cap * torch.tanh(scores / cap)
    own = torch.arange(length - n, length, device="cuda")[:, None]
    seen = position <= own
    if window:
        seen &= position > own - window
    return torch.einsum("ntl,lnh->tnh", scores.masked_fill(~seen, float("-inf")).softmax(-1), v)


def check(kernel: Callable[..., None], given: list[Tensor], rows: list[tuple[int, int]]) -> float:
    q, kv, table, _, starts, _, out = given
    worst = 0.0
    for window, cap in ((0, 0.0), (100, 0.0), (0, 20.0)):
        out.fill_(float("nan"))
        kernel(*given, SIZE**-0.5, window, cap)
        for row, (n, length) in enumerate(rows):
            first = int(starts[row])
            # The first and last queries of a row, which hold every kind of tile.
            part = expected(q[first : first + n], kv, table[row], n, length, window, cap)
            worst = max(worst, float((out[first : first + n].float() - part).abs().max()))
        if not worst < 0.02:
            raise SystemExit(f"wrong by {worst} with window {window}, cap {cap}, rows {rows}")
    return worst


def median_us(call: Callable[[], None]) -> float:
    call()
    return replayed_us(lambda: [call() for _ in range(4)], count=4, runs=NUM_RUNS)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    small = [(1, 1), (64, 64), (65, 200), (130, 130), (200, 1000), (7, 513), (128, 256)]
    for name, kernel in VARIANTS.items():
        print(f"{name}: off by at most {check(kernel, inputs(small), small):.4f}", flush=True)
    results: dict[str, Any] = {}
    for case, rows in CASES.items():
        arguments = inputs(rows)
        work = 4 * SIZE * HEADS * sum(n * (length - n) + n * (n + 1) / 2 for n, length in rows)
        results[case] = {}
        for name, kernel in VARIANTS.items():
            us = median_us(lambda: kernel(*arguments, SIZE**-0.5, 0, 0.0))  # noqa: B023
            results[case][name] = {"us": round(us, 1), "tflop_per_s": round(work / us / 1e6, 1)}
        print(case, json.dumps(results[case]), flush=True)
    record = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "cases": results}
    if given.out is not None:
        given.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
