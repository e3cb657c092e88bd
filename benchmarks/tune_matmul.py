"""Which tile of the product of 2 to 256 tokens is fastest for each matrix of some models? Prints table rows.

Every tile is checked against float32 on random data, its output poisoned beforehand, and timed in a CUDA
graph of launches over enough copies of the weight that none is still in the L2; cuBLAS beside it computes the
bare product. The winners go to `slipstream/kernels/gpu/matmul_tiles.py`.

    python benchmarks/tune_matmul.py [OUT.json] [MODEL ...]     # on the GPU to tune for
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import torch
from graph_timing import replayed_us
from torch.nn.functional import linear
from tune_gemv import SHAPES

from slipstream.kernels.gpu.gated_activation import SILU
from slipstream.kernels.gpu.launching import num_sms
from slipstream.kernels.gpu.matmul import Tile, matmul

Shape = tuple[int, int, bool]

TOKENS = (16, 32, 64, 128, 256)
# By the tile's tokens: (outputs, inputs, stages, warps, weights first) of a block.
BLOCKS = {
    16: [
        (64, 256, 5, 4, True),
        (64, 256, 3, 4, True),
        (64, 128, 10, 4, True),
        (64, 128, 6, 4, True),
        (64, 128, 5, 4, True),
        (64, 128, 3, 4, True),
        (64, 64, 6, 4, True),
        (128, 128, 5, 4, True),
    ],
    32: [
        (64, 256, 4, 4, True),
        (64, 128, 9, 4, True),
        (64, 128, 6, 4, True),
        (64, 128, 5, 4, True),
        (64, 128, 4, 4, True),
        (128, 128, 5, 4, True),
    ],
    64: [
        (64, 128, 7, 4, True),
        (64, 128, 5, 4, True),
        (64, 128, 4, 4, True),
        (64, 128, 3, 4, True),
        (64, 64, 8, 4, True),
        (64, 64, 6, 4, True),
        (64, 64, 4, 4, True),
        (128, 64, 5, 8, True),
        (128, 128, 4, 8, True),
        (32, 128, 8, 4, False),
        (32, 128, 5, 4, False),
    ],
    128: [
        (64, 64, 9, 4, True),
        (64, 64, 7, 4, True),
        (64, 64, 6, 4, True),
        (64, 64, 4, 4, True),
        (64, 64, 3, 4, True),
        (64, 128, 4, 8, True),
        (128, 64, 4, 8, True),
        (128, 64, 6, 8, True),
        (32, 64, 9, 4, False),
    ],
    256: [(64, 64, 5, 8, True), (64, 64, 4, 8, True), (128, 64, 4, 8, True)],
}
AHEAD = (2, 8)
MAX_SHARED = 227 * 1024
WORKERS = 14
LAUNCHES = 24
MIN_BYTES = 160_000_000
COUNTERS = 2048
SMALL_KERNEL_US = 2.5
BYTES_PER_US = 2.9e6
NAMED = ("shares", "weights_first", "ahead")


def tiles(tokens: int, shape: Shape, sms: int) -> list[Tile]:
    """Return the tiles worth trying: whole, and in shares where all of them run at once."""
    outputs, _, is_gated = shape
    found: list[Tile] = []
    sizes = {256: (128, 256)}.get(tokens, (tokens,))
    for size in sizes:
        for block_o, block_i, stages, warps, first in BLOCKS[size]:
            if is_gated and block_o == 128 and size == 256:
                continue
            rows = block_o * 2 if is_gated else block_o
            shared = 2 * stages * block_i * (size + rows)
            if shared > MAX_SHARED:
                continue
            count = (outputs // 2 if is_gated else outputs) // block_o * (tokens // size)
            at_once = sms * (2 if 2 * shared <= MAX_SHARED else 1)
            cuts = [1, *(k for k in (2, 4) if count * k <= at_once)]
            for shares, ahead in itertools.product(cuts, AHEAD):
                found.append(Tile(size, block_o, block_i, stages, warps, shares, first, ahead))
    return found


def call(x: torch.Tensor, weight: torch.Tensor, shape: Shape, tile: Tile, extras: dict) -> torch.Tensor:
    """Run the product as a block does: scaled before a gate, with residual and squares where it is square."""
    outputs, inputs, is_gated = shape
    options = {}
    if is_gated:
        options = {"activation": SILU, "squares_LT": extras["squares"], "eps": 1e-5}
    elif outputs <= inputs:
        options = {"residual_TO": extras["residual"], "norm_O": extras["norm"]}
    return matmul(x, weight, tile=tile, counters=extras["counters"], **options)[0]


def make_extras(tokens: int, shape: Shape) -> dict:
    outputs, inputs, _ = shape
    return {
        "squares": torch.full((32, tokens), inputs / 32, device="cuda"),
        "residual": torch.randn(tokens, outputs, device="cuda").bfloat16(),
        "norm": torch.rand(outputs, device="cuda") + 0.5,
        "counters": torch.zeros(COUNTERS, dtype=torch.int32, device="cuda"),
    }


def expected(x: torch.Tensor, weight: torch.Tensor, shape: Shape, extras: dict) -> torch.Tensor:
    y = x.float() @ weight.float().T
    if shape[2]:
        gate, up = y.chunk(2, -1)
        return torch.nn.functional.silu(gate) * up
    return y + extras["residual"].float() if shape[0] <= shape[1] else y


def timed(calls: list) -> float:
    """Return the median time of a launch within a graph, in microseconds."""
    calls[0]()

    def run() -> None:
        for i in range(LAUNCHES):
            calls[i % len(calls)]()

    return replayed_us(run, count=LAUNCHES, runs=6, skipped=1)


def is_right(x: torch.Tensor, weight: torch.Tensor, shape: Shape, tile: Tile, extras: dict, want) -> bool:
    # The allocator hands out what was just freed: an element nobody writes is NaN.
    torch.full(want.shape, torch.nan, device="cuda", dtype=torch.bfloat16)
    for _ in range(2):
        y = call(x, weight, shape, tile, extras).float()
        if not float((y - want).norm() / want.norm()) < 5e-3:
            return False
    return not bool(extras["counters"].any())


def compile_share(worker: int, models: list[str]) -> None:
    """Compile every WORKERS-th case, so that the timing process finds it in triton's cache."""
    sms = num_sms(0)
    cases = [
        (shape, tokens, tile)
        for model in models
        for shape in SHAPES[model]
        for tokens in TOKENS
        for tile in tiles(tokens, shape, sms)
    ]
    for shape, tokens, tile in cases[worker::WORKERS]:
        weight = torch.empty(shape[0], shape[1], device="cuda", dtype=torch.bfloat16)
        x = torch.empty(tokens, shape[1], device="cuda", dtype=torch.bfloat16)
        try:
            call(x, weight, shape, tile, make_extras(tokens, shape))
        except Exception as error:
            print(f"{shape} {tile}: {type(error).__name__} {str(error)[:200]}", flush=True)
    torch.cuda.synchronize()


def tune(model: str, sms: int) -> dict[str, list]:
    found: dict[str, list] = {}
    for shape in SHAPES[model]:
        outputs, inputs, _ = shape
        copies = max(1, MIN_BYTES // (2 * outputs * inputs))
        weights = [
            torch.randn(outputs, inputs, device="cuda").mul_(inputs**-0.5).bfloat16() for _ in range(copies)
        ]
        for tokens in TOKENS:
            x = torch.randn(tokens, inputs, device="cuda").bfloat16()
            extras = make_extras(tokens, shape)
            want = expected(x, weights[0], shape, extras)
            plain = timed([lambda w=w, x=x: linear(x, w) for w in weights])
            times = []
            for tile in tiles(tokens, shape, sms):
                try:
                    if not is_right(x, weights[0], shape, tile, extras, want):
                        print(f"WRONG {shape} {tokens} {tile}", flush=True)
                        extras["counters"].zero_()
                        continue
                    calls = [lambda w=w, t=tile, x=x, s=shape, e=extras: call(x, w, s, t, e) for w in weights]
                    times.append((timed(calls), tile))
                except Exception as error:
                    print(f"FAILED {shape} {tokens} {tile}: {str(error)[:150]}", flush=True)
            times.sort(key=lambda pair: pair[0])
            found[f"{shape} {tokens}"] = [plain, [[round(us, 2), repr(tile)] for us, tile in times]]
            row = f"    ({outputs}, {inputs}, {shape[2]}, {tokens}): "
            us, tile = times[0]
            is_ours = us < plain + spared(tokens, shape)
            print(
                f"{row}{describe(tile) if is_ours else None},  # {us:.1f} us, cuBLAS {plain:.1f}", flush=True
            )
            print("   ", *(f"{us:.1f} {describe(tile)[4:]}" for us, tile in times[1:4]), flush=True)
    return found


def spared(tokens: int, shape: Shape) -> float:
    """Return the microseconds of what our kernel does beside the product: a launch, bytes there and back."""
    outputs, inputs, is_gated = shape
    if not is_gated and outputs > inputs:
        return 0.0
    elements = tokens * (1.5 * outputs if is_gated else 4 * outputs)
    return SMALL_KERNEL_US + 2 * elements / BYTES_PER_US


def describe(tile: Tile) -> str:
    numbers = [tile.tokens, tile.outputs, tile.inputs, tile.stages, tile.warps]
    named = [
        f"{name}={value}"
        for name, value in zip(NAMED, (tile.shares, tile.weights_first, tile.ahead), strict=True)
        if value != getattr(Tile(*numbers), name)
    ]
    return f"Tile({', '.join([*map(str, numbers), *named])})"


def main() -> None:
    if sys.argv[1:2] == ["--compile"]:
        compile_share(int(sys.argv[2]), sys.argv[3:])
        return
    torch.backends.cuda.matmul.allow_tf32 = False
    models = sys.argv[2:] or list(SHAPES)
    arguments = [sys.executable, __file__, "--compile"]
    workers = [subprocess.Popen([*arguments, str(worker), *models]) for worker in range(WORKERS)]
    for worker in workers:
        worker.wait()
    sms = num_sms(0)
    found = dict(itertools.chain.from_iterable(tune(model, sms).items() for model in models))
    if sys.argv[1:]:
        record = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "us": found}
        Path(sys.argv[1]).write_text(json.dumps(record, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
