"""Which tiles are fastest where they run: between the other kernels of a block? Prints rows for the tables.

A product timed alone finds its own instructions and the queue of the memory warm; between others it does not.
So the kernels of some blocks, with weights of their own, are captured as one graph, attention over a context
included, and the tiles of one product after another are varied, the others staying at the best found. What
parts of the block cost is then seen by leaving them out.

    python benchmarks/tune_block.py OUT.json MODEL TOKENS [TOKENS ...]     # on the GPU to tune for
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import tune_gemv
import tune_matmul
from graph_timing import replayed_us

from slipstream.kernels.gpu.gated_activation import SILU
from slipstream.kernels.gpu.gemv import gemv
from slipstream.kernels.gpu.gemv_tiles import tile_of as gemv_tile_of
from slipstream.kernels.gpu.launching import num_sms
from slipstream.kernels.gpu.matmul import Tile, matmul
from slipstream.kernels.gpu.matmul_tiles import RULE
from slipstream.kernels.gpu.matmul_tiles import tile_of as matmul_tile_of
from slipstream.kernels.paged_decode import NUM_COUNTERS, paged_decode_op
from slipstream.kernels.rms_norm import add_rms_norm_op
from slipstream.kernels.rotary_decode import rotary_decode_op
from slipstream.kernels.rotary_store import rotary_store_op
from slipstream.kernels.silu_and_mul import silu_and_mul_op

# heads, kv heads, head size, blocks that fit and are more than the L2 holds.
HEADS = {
    "Llama-3.1-8B": (32, 8, 128, 6),
    "Qwen3-0.6B": (16, 8, 128, 28),
    "Llama-3.2-1B": (32, 8, 64, 16),
}
PRODUCTS = ("qkv", "output", "gate_up", "down")
CONTEXT = 192
PAGE = 32
WORKERS = 14
ROUNDS = 2
NAIVE = "library"


class Blocks:
    """Some blocks of a model's shape with random weights, and one step of `tokens` rows through them."""

    def __init__(self, model: str, tokens: int) -> None:
        heads, kv_heads, size, self.count = HEADS[model]
        self.shapes = dict(zip(PRODUCTS, tune_matmul.SHAPES[model], strict=False))
        self.hidden, self.tokens, self.heads = self.shapes["qkv"][1], tokens, heads

        def weights(shape: tuple[int, int, bool]) -> list[torch.Tensor]:
            make = (torch.randn(shape[0], shape[1], device="cuda") for _ in range(self.count))
            return [w.mul_(shape[1] ** -0.5).bfloat16() for w in make]

        self.weights = {name: weights(shape) for name, shape in self.shapes.items()}
        self.norm = torch.ones(self.hidden, device="cuda")
        self.x = torch.randn(tokens, self.hidden, device="cuda").bfloat16()
        pages = tokens * (CONTEXT // PAGE + 1) + 1
        self.kv = [
            torch.randn(pages, 2, PAGE, kv_heads, size, device="cuda").bfloat16() for _ in range(self.count)
        ]
        numbers = torch.arange(1, pages, dtype=torch.int32, device="cuda")
        self.table = numbers.view(tokens, -1)
        self.lens = torch.full((tokens,), CONTEXT, device="cuda")
        self.positions = self.lens - 1
        self.slots = self.table[:, (CONTEXT - 1) // PAGE].long() * PAGE + (CONTEXT - 1) % PAGE
        self.rotary = torch.randn(CONTEXT + 1, 2, size, device="cuda")
        self.counters = torch.zeros(NUM_COUNTERS, dtype=torch.int32, device="cuda")
        self.zeros = torch.zeros(2048, dtype=torch.int32, device="cuda")

    def attend(self, qkv: torch.Tensor, i: int, without: set[str]) -> torch.Tensor:
        width = self.heads * self.rotary.shape[2]
        if "rotary" in without:
            return qkv[:, :width]
        shared = (self.rotary, self.positions, None, None, 0.0, False, self.heads, self.kv[i], self.slots)
        if self.tokens == 1 and "attention" not in without:
            lengths = (self.table, self.lens, self.counters, 8192, 0.09, 0, 0.0)
            return rotary_decode_op(qkv, *shared, *lengths).flatten(1)
        q = rotary_store_op(qkv, *shared)
        if "attention" in without:
            return q.flatten(1)
        out = torch.empty_like(q)
        paged_decode_op(q, self.kv[i], self.table, self.lens, out, self.counters, 8192, 0.09, 0, 0.0)
        return out.flatten(1)

    def several(self, tiles: dict[str, Any], without: set[str]) -> torch.Tensor:
        x, (ready, squares) = self.x, (self.x, None)
        for i in range(self.count):
            w = {name: self.weights[name][i] for name in PRODUCTS}
            qkv = self.product(ready, w["qkv"], tiles["qkv"], squares)
            attended = self.attend(qkv, i, without)
            x, ready, squares = self.summed(attended, w["output"], tiles["output"], x)
            if tiles["gate_up"] is None:
                mixed = silu_and_mul_op(torch.nn.functional.linear(ready, w["gate_up"]))
            else:
                mixed = self.product(ready, w["gate_up"], tiles["gate_up"], squares, activation=SILU)
            x, ready, squares = self.summed(mixed, w["down"], tiles["down"], x)
        return x

    def product(
        self, x: torch.Tensor, w: torch.Tensor, tile: Any, squares: Any, **options: Any
    ) -> torch.Tensor:
        if tile is None:
            return torch.nn.functional.linear(x, w)
        return matmul(x, w, tile=tile, squares_LT=squares, eps=1e-5, counters=self.zeros, **options)[0]

    def summed(self, x: torch.Tensor, w: torch.Tensor, tile: Any, residual: torch.Tensor) -> tuple:
        if tile is None:
            ready, total = add_rms_norm_op(torch.nn.functional.linear(x, w), residual, self.norm, 1e-5)
            return total, ready, None
        return matmul(x, w, tile=tile, residual_TO=residual, norm_O=self.norm, counters=self.zeros)

    def one(self, tiles: dict[str, Any], without: set[str]) -> torch.Tensor:
        x = self.x
        normed = {"norm_I": self.norm, "eps": 1e-5}
        for i in range(self.count):
            w = {name: self.weights[name][i] for name in PRODUCTS}
            qkv = gemv(x, w["qkv"], tile=tiles["qkv"], **normed)
            x = gemv(self.attend(qkv, i, without), w["output"], tile=tiles["output"], residual_1O=x)
            mixed = gemv(x, w["gate_up"], tile=tiles["gate_up"], activation=SILU, **normed)
            x = gemv(mixed, w["down"], tile=tiles["down"], residual_1O=x)
        return x

    def time_us(self, tiles: dict[str, Any], without: set[str] = frozenset()) -> float:  # type: ignore[assignment]
        """Return the median time of one block within the graph."""
        run = self.one if self.tokens == 1 else self.several
        run(tiles, without)
        return replayed_us(lambda: run(tiles, without), count=self.count, runs=8, skipped=2)

    def is_right(self, name: str, tile: Any) -> bool:
        if self.tokens == 1:
            return True
        shape, weight = self.shapes[name], self.weights[name][0]
        x = torch.randn(self.tokens, shape[1], device="cuda").bfloat16()
        extras = tune_matmul.make_extras(self.tokens, shape)
        want = tune_matmul.expected(x, weight, shape, extras)
        return tune_matmul.is_right(x, weight, shape, tile, extras, want)

    def first(self) -> dict[str, Any]:
        if self.tokens == 1:
            return {n: gemv_tile_of(self.weights[n][0], is_gated=s[2]) for n, s in self.shapes.items()}
        tiles: dict[str, Any] = {}
        for name, (_, inputs, is_gated) in self.shapes.items():
            x = self.x.new_empty(self.tokens, inputs)
            tiles[name] = matmul_tile_of(x, self.weights[name][0], is_gated=is_gated, has_counters=True)
        return tiles


def candidates(name: str, shape: tuple[int, int, bool], tokens: int) -> list[Any]:
    if tokens == 1:
        return [tile for tile in tune_gemv.TILES if shape[1] % tile[1] == 0]
    return [None, *tune_matmul.tiles(tokens, shape, num_sms(0))]


def settle(tiles: dict[str, Any], size: int) -> dict[str, Any]:
    """Make a choice one that can run: what leaves squares behind needs a product of ours next."""
    for first, second in (("output", "gate_up"), ("down", "qkv")):
        if tiles[first] is not None and tiles[second] is None:
            tiles[second] = RULE[size]
    return tiles


def tune(model: str, tokens: int) -> dict[str, Any]:
    blocks = Blocks(model, tokens)
    size = next((s for s in tune_matmul.TOKENS if tokens <= s), 0)
    best = blocks.first()
    if tokens > 1:
        best = settle(best, size)
    best_us = blocks.time_us(best)
    print(f"{model} {tokens}: {best_us:.1f} us a block with the table", flush=True)
    for _ in range(ROUNDS):
        for name in PRODUCTS:
            times = []
            for tile in candidates(name, blocks.shapes[name], tokens):
                tiles = {**best, name: tile}
                if tokens > 1 and settle(dict(tiles), size) != tiles:
                    continue
                if tile is not None and not blocks.is_right(name, tile):
                    print(f"  WRONG {name} {tile}", flush=True)
                    continue
                times.append((blocks.time_us(tiles), repr(tile), tile))
            times.sort(key=lambda entry: entry[0])
            if times[0][0] < best_us:
                best, best_us = {**best, name: times[0][2]}, times[0][0]
            print(f"  {name}: " + " | ".join(f"{us:.1f} {text[4:]}" for us, text, _ in times[:4]), flush=True)
    print(f"{model} {tokens}: {best_us:.1f} us a block with", flush=True)
    for name, shape in blocks.shapes.items():
        tile = best[name]
        shown = tune_matmul.describe(tile) if isinstance(tile, Tile) else tile
        print(f"    {(*shape, tokens) if tokens > 1 else shape}: {shown},", flush=True)
    parts = {"all": best_us}
    for left_out in ({"attention"}, {"attention", "rotary"}):
        parts["without " + " and ".join(sorted(left_out))] = blocks.time_us(best, left_out)
    if tokens > 1:
        parts[NAIVE] = blocks.time_us(dict.fromkeys(PRODUCTS))
    print(f"  parts: { ({name: round(us, 1) for name, us in parts.items()}) }", flush=True)
    return {"tiles": {name: repr(tile) for name, tile in best.items()}, "us": parts}


def compile_share(worker: int, model: str, sizes: list[int]) -> None:
    cases = [
        (shape, tokens, tile)
        for tokens in sizes
        for name, shape in zip(PRODUCTS, tune_matmul.SHAPES[model], strict=False)
        for tile in candidates(name, shape, tokens)
        if tile is not None
    ]
    for shape, tokens, tile in cases[worker::WORKERS]:
        weight = torch.empty(shape[0], shape[1], device="cuda", dtype=torch.bfloat16)
        x = torch.empty(tokens, shape[1], device="cuda", dtype=torch.bfloat16)
        if tokens == 1:
            tune_gemv.call(x, weight, torch.ones(shape[1], device="cuda"), shape[2], tile)
        else:
            tune_matmul.call(x, weight, shape, tile, tune_matmul.make_extras(tokens, shape))
    torch.cuda.synchronize()


def main() -> None:
    if sys.argv[1] == "--compile":
        compile_share(int(sys.argv[2]), sys.argv[3], [int(n) for n in sys.argv[4:]])
        return
    out, model, sizes = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
    arguments = [sys.executable, __file__, "--compile"]
    workers = [subprocess.Popen([*arguments, str(i), model, *sizes]) for i in range(WORKERS)]
    for worker in workers:
        worker.wait()
    found = {tokens: tune(model, int(tokens)) for tokens in sizes}
    record = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, model: found}
    out.write_text(json.dumps(record, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
