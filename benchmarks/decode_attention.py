"""What does attention of one-token rows cost, cut row by row, in equal shares, and behind a shared beginning?

Some layers' pages, more than the L2 holds, random and in random order, in bfloat16; the layers' calls are one
CUDA graph, as in a step, and what is made once a step (the borders) is in it too. Before anything is timed
its output, poisoned, is compared with float64 for some rows. GB/s are of the keys and values that have to be
read: once for a shared beginning.

Predicted for an H100 (3.02 TB/s of copy, 264 programs over shared beginnings), microseconds a layer:
  even 64 x 192      50 MB, 16.7 at the copy's rate: 21 both ways
  even 256 x 192     201 MB, 67: 73 both ways
  ragged 256         1.13 GB, 373: rows one by one 500 to 540, in equal shares 405
  few 1..8 x 32k     0.13..1.07 GB, 44..356: 55..385
  shared 64 x 4096   17 + 34 MB and 4.3 GFLOP: rows one by one 250 to 300 (L2), shared 30 to 36

    python benchmarks/decode_attention.py [--variants] [--out decode_attention.json]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from graph_timing import replayed_us

from slipstream.kernels import shared_prefix as prefix_file
from slipstream.kernels.balanced_decode import balanced_decode_op
from slipstream.kernels.decode_borders import decode_borders_op
from slipstream.kernels.decode_shares import keys_of_unit, num_programs
from slipstream.kernels.gpu import balanced_decode as balanced_file
from slipstream.kernels.gpu import shared_prefix_decode as prefix_kernel_file
from slipstream.kernels.gpu import shared_prefix_decode as shared_file
from slipstream.kernels.paged_decode import NUM_COUNTERS, paged_decode, paged_decode_op
from slipstream.kernels.shared_prefix import PrefixLayout, SharedGroup
from slipstream.kernels.shared_prefix import num_programs as num_prefix_programs
from slipstream.kernels.shared_prefix_decode import shared_prefix_decode_op

PAGE, MAX_LEN = 32, 8192
ROTATED_BYTES = 256 << 20
RUNS = 12
HEADS_8B, HEADS_06B = (32, 8, 128), (16, 8, 128)
TOLERANCE = 2e-2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    name: str
    lens: list[int]
    heads: tuple[int, int, int] = HEADS_8B
    groups: tuple[SharedGroup, ...] = ()

    @property
    def positions(self) -> int:
        """Return how many positions have to be read."""
        return sum(self.lens) - sum((len(group.rows) - 1) * group.tokens for group in self.groups)

    @property
    def layer_bytes(self) -> int:
        return self.positions * 2 * 2 * self.heads[1] * self.heads[2]


def cases() -> list[Case]:
    rng = random.Random(18)
    ragged = [rng.randint(100, 2048) for _ in range(256)]
    found = [
        Case(name="even 64 x 192", lens=[192] * 64),
        Case(name="even 256 x 192", lens=[192] * 256),
        Case(name="even 16 x 192", lens=[192] * 16),
        Case(name="ragged 256 x 100..2048", lens=ragged, heads=HEADS_06B),
        Case(name="ragged 64 x 100..2048", lens=ragged[:64]),
        Case(name="one of 8192 beside 31 of 200", lens=[8192] + [200] * 31),
        Case(name="48 of 192 in a step of 64", lens=[192] * 48 + [0] * 16),
    ]
    found += [Case(name=f"{rows} x 32k", lens=[32768] * rows) for rows in (1, 2, 4, 8)]
    for rows, tokens in ((64, 4096), (64, 512), (16, 4096), (256, 1024)):
        own = [tokens + rng.randint(64, 192) for _ in range(rows)]
        groups = (SharedGroup(tuple(range(rows)), tokens),)
        found.append(Case(name=f"shared {rows} x {tokens}", lens=own, groups=groups))
    halves = (SharedGroup(tuple(range(0, 64, 2)), 2048), SharedGroup(tuple(range(1, 64, 2)), 2048))
    found.append(Case(name="shared 2 x 32 x 2048", lens=[2048 + 128] * 64, groups=halves))
    return found


class Layers:
    """The pages of some layers, and one step of rows through them."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.num_heads, self.kv_heads, self.size = case.heads
        rows = len(case.lens)
        blocks = [-(-length // PAGE) for length in case.lens]
        order = torch.randperm(sum(blocks), generator=torch.Generator().manual_seed(0)).int() + 1
        self.table = torch.zeros(rows, max(MAX_LEN // PAGE, *blocks), dtype=torch.int32)
        at = 0
        for row, count in enumerate(blocks):
            self.table[row, :count] = order[at : at + count]
            at += count
        for members, tokens in case.groups:
            self.table[list(members), : tokens // PAGE] = self.table[members[0], : tokens // PAGE].clone()
        self.table = self.table.cuda()
        self.lens = torch.tensor(case.lens, device="cuda")
        self.count = max(2, min(24, -(-ROTATED_BYTES // case.layer_bytes)))
        shape = (1 + sum(blocks), 2, PAGE, self.kv_heads, self.size)
        self.kv = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(self.count)]
        for pages in self.kv:
            pages[0] = torch.nan
        self.q = torch.randn(rows, self.num_heads, self.size, device="cuda", dtype=torch.bfloat16)
        self.counters = torch.zeros(NUM_COUNTERS, dtype=torch.int32, device="cuda")
        self.programs = num_programs(self.lens.device)
        self.layout = PrefixLayout(
            max_rows=rows,
            heads=self.num_heads // self.kv_heads,
            kv_heads=self.kv_heads,
            programs=num_prefix_programs(self.lens.device),
        )
        self.shared = self.layout.views(torch.from_numpy(self.layout.pack(case.groups)).cuda(), rows)
        self.outs = [torch.empty_like(self.q) for _ in range(self.count)]

    def row_by_row(self) -> None:
        for kv, out in zip(self.kv, self.outs, strict=True):
            limits = (max(MAX_LEN, *self.case.lens), self.size**-0.5, 0, 0.0)
            paged_decode_op(self.q, kv, self.table, self.lens, out, self.counters, *limits)

    def borders(self, shared: torch.Tensor | None) -> torch.Tensor:
        keys = keys_of_unit(torch.bfloat16, self.size)
        return decode_borders_op(self.lens, shared, self.kv_heads, keys, 0, self.programs)

    def balanced(self) -> None:
        borders = self.borders(None)
        for kv, out in zip(self.kv, self.outs, strict=True):
            scoring = (self.size**-0.5, 0, 0.0)
            balanced_decode_op(self.q, kv, self.table, self.lens, borders, out, self.counters, *scoring)

    def sharing(self) -> None:
        borders = self.borders(self.shared.rows_5R[0])
        for kv, out in zip(self.kv, self.outs, strict=True):
            given = (self.q, kv, self.table, self.lens, borders, *self.shared)
            shared_prefix_decode_op(*given, out, self.counters, self.size**-0.5, 0.0)

    def error(self, run: Callable[[], None]) -> float:
        """Return how far the outputs of the first and last layer are from float64, for some rows."""
        for out in self.outs:
            out.fill_(torch.nan)
        run()
        worst = 0.0
        rows = sorted({0, len(self.lens) // 3, len(self.lens) // 2, len(self.lens) - 1})
        for layer in (0, -1):
            expected = torch.empty(len(rows), *self.q.shape[1:], dtype=torch.float64, device="cuda")
            given = (self.q[rows].double(), self.kv[layer], self.table[rows], self.lens[rows])
            paged_decode(*given, expected, self.counters, 0, self.size**-0.5, 0, 0.0)
            # NaN anywhere, even in a row that is not compared, is no result.
            all_rows = float(self.outs[layer].float().abs().max())
            difference = float((self.outs[layer][rows].double() - expected).abs().max())
            worst = max(worst, difference) if all_rows == all_rows else float("nan")
        if bool(self.counters.any()):
            raise SystemExit(f"{self.case.name}: counters are left behind")
        return worst

    def time_us(self, run: Callable[[], None]) -> float:
        """Return the median time of one layer within the graph."""
        error = self.error(run)
        if not error <= TOLERANCE:
            raise SystemExit(f"{self.case.name}, {run.__name__}: off by {error}; nothing is timed")
        return replayed_us(run, count=self.count, runs=RUNS, skipped=2)


def measure(case: Case) -> dict[str, Any]:
    layers = Layers(case)
    found = {"row by row": layers.time_us(layers.row_by_row), "balanced": layers.time_us(layers.balanced)}
    if case.groups:
        found["shared"] = layers.time_us(layers.sharing)
    best = min(found.values())
    shown = ", ".join(f"{name} {us:.1f}" for name, us in found.items())
    rate = case.layer_bytes / best / 1e3
    print(f"{case.name}: {shown} us a layer; {rate:.0f} GB/s", flush=True)
    return {"case": case.name, "bytes": case.layer_bytes, "us": found}


# Programs a multiprocessor, registers of a thread, blocks on their way.
VARIANTS = [(4, 128, 3), (4, 128, 4), (4, 128, 5), (3, 168, 3), (3, 168, 5), (2, 255, 5)]
SHARED_STAGES = (3, 4, 5, 6)


# Lines of a tile over a shared beginning, and programs a multiprocessor.
PREFIX_VARIANTS = [(64, 2), (128, 1), (64, 1), (128, 2)]


def vary_prefixes() -> None:
    """Print what other tiles over shared beginnings give."""
    for case in cases():
        if not case.groups:
            continue
        times = []
        for lines, per_sm in PREFIX_VARIANTS:
            prefix_file.TILE_LINES = prefix_kernel_file.TILE_LINES = lines
            prefix_file.PROGRAMS_PER_SM = per_sm
            num_prefix_programs.cache_clear()
            layers = Layers(case)
            times.append((layers.time_us(layers.sharing), (lines, per_sm)))
        times.sort()
        print(f"{case.name}: " + " | ".join(f"{us:.1f} {what}" for us, what in times), flush=True)


def vary() -> None:
    """Print what other numbers of programs, registers and stages give."""
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    chosen = [case for case in cases() if case.name.split()[0] in ("even", "ragged")]
    for case in chosen:
        layers = Layers(case)
        times = []
        for per_sm, registers, stages in VARIANTS:
            layers.programs = per_sm * sms
            balanced_file.MAX_REGISTERS, balanced_file.STAGES = registers, stages
            times.append((layers.time_us(layers.balanced), (per_sm, registers, stages)))
        times.sort()
        print(f"{case.name}: " + " | ".join(f"{us:.1f} {what}" for us, what in times), flush=True)
    balanced_file.MAX_REGISTERS, balanced_file.STAGES = VARIANTS[0][1:]
    for case in (case for case in cases() if case.groups):
        layers, times = Layers(case), []
        for stages in SHARED_STAGES:
            shared_file.STAGES = stages
            times.append((layers.time_us(layers.sharing), stages))
        times.sort()
        print(f"{case.name}: " + " | ".join(f"{us:.1f} {n} stages" for us, n in times), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--variants", action="store_true")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.manual_seed(0)
    rows = [measure(case) for case in cases()]
    if given.variants:
        vary()
        vary_prefixes()
    if given.out is not None:
        record = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "rows": rows}
        given.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
