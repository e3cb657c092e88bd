"""In which tiles do products with the same bits in every batch run fastest on a GPU, and what do they cost?

The products of Llama-3.1-8B, each with what stands behind it: for each number of tokens every tile worth
trying is compared, bit for bit, with what single tokens give, and with float64; it is timed in a captured run
of launches over more copies of the weight than the L2 holds, beside the library's bare product. Prints rows
for the table of `slipstream/kernels/gpu/queued_tiles.py`, then what the products of all blocks take together.

    python benchmarks/fixed_matmul.py [--tokens 1,16,64] [--out fixed_matmul.json]   # on the GPU to tune for
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from graph_timing import replayed_us
from torch import Tensor
from torch.nn.functional import linear, silu

from slipstream.kernels.gpu.gated_activation import SILU
from slipstream.kernels.gpu.queued_matmul import NO_ACTIVATION, Tile, queued_matmul
from slipstream.kernels.gpu.queued_tiles import rule_of, tile_of

TOKENS = "1,16,64,128,256,512,2048,8192"
# Rows that are sampled, not tokens, meet the head.
MAX_HEAD_TOKENS = 256
LAYERS = 32

FEW = [
    Tile(64, 64, 128, 5, 4, ahead=2),
    Tile(64, 64, 128, 5, 4),
    Tile(64, 64, 128, 7, 4, ahead=2),
    Tile(64, 64, 128, 4, 4, ahead=2),
    Tile(64, 64, 128, 3, 4, ahead=2),
    Tile(64, 64, 256, 3, 4, ahead=2),
    Tile(64, 64, 64, 8, 4, ahead=4),
    Tile(64, 32, 128, 8, 4, ahead=2),
    Tile(64, 32, 128, 9, 4, ahead=8),
    Tile(64, 32, 128, 5, 4, ahead=2),
    Tile(64, 32, 256, 4, 4, ahead=1),
    Tile(64, 128, 128, 4, 4, ahead=2),
    Tile(64, 128, 64, 6, 4, ahead=2),
    Tile(64, 128, 64, 8, 4, ahead=2),
    Tile(64, 128, 64, 8, 8, ahead=2),
    Tile(64, 128, 64, 4, 4, ahead=2),
]
MIDDLE = [
    Tile(64, 64, 128, 5, 4, ahead=2),
    Tile(64, 32, 128, 8, 4, ahead=2),
    Tile(64, 64, 64, 6, 4, ahead=2),
    Tile(128, 32, 128, 5, 4, ahead=2),
    Tile(128, 64, 128, 4, 8, ahead=2),
    Tile(128, 64, 64, 8, 4, ahead=2),
    Tile(128, 64, 64, 4, 4, ahead=2),
    Tile(128, 128, 64, 6, 8, ahead=2),
    Tile(128, 128, 64, 3, 8),
    Tile(128, 128, 64, 5, 8, in_turn=True),
    Tile(128, 256, 64, 4, 8),
]
MANY = [
    Tile(128, 256, 64, 4, 8, in_turn=True),
    Tile(128, 256, 64, 3, 8, in_turn=True),
    Tile(128, 256, 64, 4, 8, group=8, in_turn=True),
    Tile(128, 256, 64, 4, 8),
    Tile(128, 128, 64, 5, 8, in_turn=True),
    Tile(128, 128, 64, 3, 8),
    Tile(256, 128, 64, 4, 8, group=8, in_turn=True),
    Tile(256, 128, 64, 3, 8, group=8),
    Tile(128, 64, 64, 4, 4),
]
# Few tokens with the weights on the rows of the matrix unit: never in the table unless their bits agree.
TURNED = [
    Tile(16, 64, 256, 4, 4, weights_first=True, ahead=2),
    Tile(16, 64, 128, 8, 4, weights_first=True, ahead=2),
    Tile(64, 64, 128, 5, 4, weights_first=True, ahead=2),
    Tile(64, 128, 64, 5, 8, weights_first=True, ahead=2),
]
MAX_SHARED = 227 * 1024
# Beside the queue: barriers, and where tiles follow each other, a place to turn a result about.
SPARE_BYTES = {False: 1 << 10, True: 33 << 10}
WORKERS = 14
ROTATED_BYTES = 200 << 20
# Of a captured run, and how many launches it has at most.
RUN_US, MAX_LAUNCHES, RUNS = 4000.0, 24, 6
NAMED = ("weights_first", "ahead", "group", "in_turn")


@dataclasses.dataclass(frozen=True, slots=True)
class Product:
    """One product of a block, or the head; `is_sum` where a residual is added to it."""

    name: str
    rows: int
    inputs: int
    is_gated: bool = False
    is_sum: bool = False

    def tiles(self, tokens: int) -> list[Tile]:
        """Return the tiles worth trying."""
        ruled = rule_of(tokens, self.rows // 2 if self.is_gated else self.rows, is_gated=self.is_gated)
        known = FEW + TURNED if tokens <= 64 else MIDDLE if tokens <= 512 else MANY
        turned = (tile for tile in known if not tile.weights_first or tokens <= tile.tokens)
        return list(dict.fromkeys((ruled, *(self._fitted(tile) for tile in turned))))

    def _fitted(self, tile: Tile) -> Tile:
        """Return a tile with as many stages as there is room for."""
        # Gate and up together make the width: what is plain at 256 is gated at 128.
        if self.is_gated and tile.tokens * tile.outputs > 128 * 128:
            tile = dataclasses.replace(tile, outputs=tile.outputs // 2)
        stage = 2 * tile.inputs * (tile.tokens + tile.outputs * (2 if self.is_gated else 1))
        room = MAX_SHARED - SPARE_BYTES[tile.in_turn]
        return dataclasses.replace(tile, stages=min(tile.stages, room // stage))


PRODUCTS = [
    Product("qkv", 6144, 4096),
    Product("output", 4096, 4096, is_sum=True),
    Product("gate_up", 28672, 4096, is_gated=True),
    Product("down", 4096, 14336, is_sum=True),
    Product("head", 128256, 4096),
]


def cases(sizes: list[int]) -> list[tuple[Product, int]]:
    return [(p, n) for p in PRODUCTS for n in sizes if p.name != "head" or n <= MAX_HEAD_TOKENS]


def call(p: Product, x: Tensor, weight: Tensor, residual: Tensor, tile: Tile) -> Tensor:
    return queued_matmul(
        x,
        weight,
        tile=tile,
        activation=SILU if p.is_gated else NO_ACTIVATION,
        residual_TO=residual[: len(x)] if p.is_sum else None,
    )


def compile_share(worker: int, sizes: list[int]) -> None:
    """Compile every WORKERS-th kernel, so that the timing process finds it in triton's cache."""
    found = dict.fromkeys((p, tile) for p, n in cases(sizes) for tile in p.tiles(n))
    for p, tile in itertools.islice(found, worker, None, WORKERS):
        weight, x, residual = (
            torch.empty(rows, columns, device="cuda", dtype=torch.bfloat16)
            for rows, columns in ((p.rows, p.inputs), (64, p.inputs), (64, p.rows))
        )
        try:
            call(p, x, weight, residual, tile)
        except Exception as error:
            print(f"{p} {tile}: {type(error).__name__} {str(error)[:200]}", flush=True)
    torch.cuda.synchronize()


def timed(run_one: Any, copies: int, guess_us: float) -> float:
    """Return the median microseconds of one launch of `run_one(i)`, i below `copies`."""
    launches = int(min(MAX_LAUNCHES, max(2, RUN_US // guess_us)))
    run_one(0)
    return replayed_us(
        lambda: [run_one(i % copies) for i in range(launches)][-1], count=launches, runs=RUNS, skipped=1
    )


def exact(p: Product, x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
    """Return the product of some tokens in float64, by runs of rows: a whole head in float64 is large."""
    y = torch.cat([x.double() @ some.double().T for some in weight.split(8192)], 1)
    if p.is_gated:
        gate, up = y.chunk(2, -1)
        return silu(gate) * up
    return y + residual.double() if p.is_sum else y


def measure(p: Product, sizes: list[int]) -> dict[int, dict[str, Any]]:
    copies = max(2, ROTATED_BYTES // (2 * p.rows * p.inputs))
    torch.manual_seed(0)
    weights = [
        (torch.randn(p.rows, p.inputs, device="cuda") * p.inputs**-0.5).bfloat16() for _ in range(copies)
    ]
    x = torch.randn(max(sizes), p.inputs, device="cuda").bfloat16()
    residual = torch.randn(max(sizes), p.rows if p.is_sum else 1, device="cuda").bfloat16()
    # The reference of bits: the tile of one token, which single tokens are then compared with.
    alone = tile_of(1, weights[0], is_gated=p.is_gated)
    whole = call(p, x, weights[0], residual, alone)
    for token in {0, len(x) // 2, len(x) - 1}:
        one = call(p, x[token : token + 1], weights[0], residual[token:], alone)
        assert torch.equal(one[0], whole[token]), (p, token)
    few = slice(0, min(64, len(x)))
    want = exact(p, x[few], weights[0], residual[few])
    error = float((whole[few].double() - want).norm() / want.norm())
    # 2^-9 relative is a rounding to bfloat16.
    assert error < 3e-3, (p, error)
    found: dict[int, dict[str, Any]] = {}
    for n in sizes:
        library = timed(lambda i, n=n: linear(x[:n], weights[i]), copies, 30.0 + n)
        rows = []
        for tile in p.tiles(n):
            try:
                # The allocator hands out what was just freed: an element nobody writes is NaN.
                torch.full_like(whole[:n], torch.nan)
                is_same = torch.equal(call(p, x[:n], weights[0], residual, tile), whole[:n])
                us = timed(
                    lambda i, n=n, t=tile: call(p, x[:n], weights[i], residual, t), copies, library * 1.5
                )
            except Exception as failed:
                print(f"FAILED {p.name} {n} {describe(tile)}: {str(failed)[:150]}", flush=True)
                continue
            rows.append((us, tile, is_same))
        rows.sort(key=lambda row: row[0])
        found[n] = {"library_us": library, "error": error, "rows": rows}
        show(p, n, found[n])
    return found


def may_choose(tile: Tile, is_same: bool) -> bool:
    return is_same and not tile.weights_first


def show(p: Product, tokens: int, found: dict[str, Any]) -> None:
    for us, tile, is_same in found["rows"]:
        if not is_same:
            print(f"OTHER BITS {p.name} {tokens} {describe(tile)} ({us:.1f} us)", flush=True)
    best = next((row for row in found["rows"] if may_choose(row[1], row[2])), None)
    if best is None:
        print(f"NO TILE {p.name} {tokens}: none has the bits of a token alone", flush=True)
        return
    us, tile, _ = best
    bytes_ps = 2 * p.rows * p.inputs / us / 1e6
    rate = f"{bytes_ps:.2f} TB/s, {tokens * bytes_ps:.0f} TFLOP/s"
    print(f"    ({p.rows}, {p.inputs}, {p.is_gated}, {tokens}): {describe(tile)},", flush=True)
    others = "; ".join(f"{us:.1f} {describe(tile)[4:]}" for us, tile, _ in found["rows"][:4])
    print(f"      # {p.name}: {us:.1f} us ({rate}), cuBLAS {found['library_us']:.1f}; {others}", flush=True)


def describe(tile: Tile) -> str:
    numbers = [tile.tokens, tile.outputs, tile.inputs, tile.stages, tile.warps]
    named = [
        f"{name}={value}" for name in NAMED if (value := getattr(tile, name)) != getattr(Tile(*numbers), name)
    ]
    return f"Tile({', '.join([*map(str, numbers), *named])})"


def summarise(found: dict[str, dict[int, dict[str, Any]]], sizes: list[int]) -> list[dict[str, Any]]:
    """Return what the products of all blocks take by the best tiles, those chosen now, and the library."""
    lines = []
    for n in sizes:
        blocks = {name: rows[n] for name, rows in found.items() if name != "head"}
        ours = sum(best_us(b) for b in blocks.values())
        chosen = sum(chosen_us(name, n, b) for name, b in blocks.items())
        library = sum(b["library_us"] for b in blocks.values())
        lines.append({
            "tokens": n,
            "stack_ms": LAYERS * ours / 1e3,
            "chosen_now_ms": LAYERS * chosen / 1e3,
            "library_ms": LAYERS * library / 1e3,
        })  # fmt: skip
    return lines


def best_us(found: dict[str, Any]) -> float:
    return min((us for us, tile, is_same in found["rows"] if may_choose(tile, is_same)), default=float("nan"))


def chosen_us(name: str, tokens: int, found: dict[str, Any]) -> float:
    """Return the microseconds of the tile that a step takes today; NaN where it was not tried."""
    p = next(one for one in PRODUCTS if one.name == name)
    weight = torch.empty(p.rows, p.inputs, device="meta")
    tile = tile_of(tokens, weight, is_gated=p.is_gated)
    return next((us for us, tried, _ in found["rows"] if tried == tile), float("nan"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", default=TOKENS)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--compile", type=int, help="compile this worker's share of the kernels and end")
    given = parser.parse_args()
    sizes = [int(size) for size in given.tokens.split(",")]
    if given.compile is not None:
        compile_share(given.compile, sizes)
        return
    begun = time.monotonic()
    arguments = [sys.executable, __file__, "--tokens", given.tokens, "--compile"]
    workers = [subprocess.Popen([*arguments, str(worker)]) for worker in range(WORKERS)]
    for worker in workers:
        worker.wait()
    print(f"compiled in {time.monotonic() - begun:.0f} s", flush=True)
    found = {p.name: measure(p, [n for one, n in cases(sizes) if one == p]) for p in PRODUCTS}
    lines = summarise(found, sizes)
    for line in lines:
        print(json.dumps(line))
    print(f"done in {time.monotonic() - begun:.0f} s")
    if given.out is not None:
        record = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "stacks": lines}
        record["us"] = {
            f"{name} {n}": [
                one["library_us"],
                one["error"],
                *([us, repr(t), ok] for us, t, ok in one["rows"]),
            ]
            for name, rows in found.items()
            for n, one in rows.items()
        }
        given.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
