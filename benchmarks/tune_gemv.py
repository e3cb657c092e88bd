"""Which tile of the one-token product is fastest for each matrix of some models? Prints rows for the table.

Each tile runs in a CUDA graph of launches over enough copies of the weight that none is still in the L2. The
winners go to `slipstream/kernels/gpu/gemv_tiles.py`. Usage: `python benchmarks/tune_gemv.py [OUT.json]`, on
the GPU to tune for.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys

import torch
from graph_timing import replayed_us

from slipstream.kernels.gpu.gated_activation import SILU
from slipstream.kernels.gpu.gemv import NO_ACTIVATION, gemv

# (outputs, inputs, is gated): q k v, output, gate and up, down, head of each model.
SHAPES = {
    "Llama-3.1-8B": [
        (6144, 4096, False),
        (4096, 4096, False),
        (28672, 4096, True),
        (4096, 14336, False),
        (128256, 4096, False),
    ],
    "Qwen3-0.6B": [
        (4096, 1024, False),
        (1024, 2048, False),
        (6144, 1024, True),
        (1024, 3072, False),
        (151936, 1024, False),
    ],
    "Llama-3.2-1B": [
        (3072, 2048, False),
        (2048, 2048, False),
        (16384, 2048, True),
        (2048, 8192, False),
        (128256, 2048, False),
    ],
}
TILES = [
    *itertools.product((1, 2, 4), (1024,), (2, 4)),
    *itertools.product((2, 4), (512,), (2, 4)),
    *itertools.product((1, 2), (2048,), (4, 8)),
    (4, 1024, 8),
    (4, 512, 8),
    (8, 1024, 4),
    (1, 512, 1),
    (1, 1024, 1),
    (2, 512, 1),
    (2, 1024, 1),
    (1, 2048, 2),
    (8, 512, 4),
    (8, 1024, 8),
]
WORKERS = 8
LAUNCHES = 48
MIN_BYTES = 200_000_000


def call(
    x: torch.Tensor, weight: torch.Tensor, norm: torch.Tensor, is_gated: bool, tile: tuple
) -> torch.Tensor:
    """Run the product as a block does: the norm before wide ones, the residual after square ones."""
    outputs = len(weight) // 2 if is_gated else len(weight)
    has_norm = len(weight) > weight.shape[1]
    residual = None if has_norm else weight[0, :1].expand(1, outputs).contiguous()
    activation = SILU if is_gated else NO_ACTIVATION
    return gemv(
        x,
        weight,
        norm_I=norm if has_norm else None,
        eps=1e-5,
        residual_1O=residual,
        activation=activation,
        tile=tile,
    )


def time_us(shape: tuple[int, int, bool], tile: tuple[int, int, int]) -> float:
    """Return the median time of a launch within a graph."""
    outputs, inputs, is_gated = shape
    copies = max(1, MIN_BYTES // (2 * outputs * inputs))
    weights = [
        torch.randn(outputs, inputs, device="cuda").mul_(inputs**-0.5).bfloat16() for _ in range(copies)
    ]
    x, norm = torch.randn(1, inputs, device="cuda").bfloat16(), torch.rand(inputs, device="cuda")
    call(x, weights[0], norm, is_gated, tile)

    def run() -> None:
        for i in range(LAUNCHES):
            call(x, weights[i % copies], norm, is_gated, tile)

    return replayed_us(run, count=LAUNCHES, runs=7, skipped=1)


def compile_share(worker: int) -> None:
    """Compile every WORKERS-th case, so that the timing process finds it in triton's cache."""
    cases = [(shape, tile) for shapes in SHAPES.values() for shape in shapes for tile in TILES]
    for (outputs, inputs, is_gated), tile in cases[worker::WORKERS]:
        weight = torch.zeros(outputs, inputs, device="cuda", dtype=torch.bfloat16)
        x = torch.zeros(1, inputs, device="cuda", dtype=torch.bfloat16)
        call(x, weight, torch.zeros(inputs, device="cuda"), is_gated, tile)
    torch.cuda.synchronize()


def main() -> None:
    if sys.argv[1:2] == ["--compile"]:
        compile_share(int(sys.argv[2]))
        return
    workers = [
        subprocess.Popen([sys.executable, __file__, "--compile", str(worker)]) for worker in range(WORKERS)
    ]
    for worker in workers:
        worker.wait()
    found = {}
    for model, shapes in SHAPES.items():
        for shape in shapes:
            times = sorted((time_us(shape, tile), tile) for tile in TILES)
            rate = 2 * shape[0] * shape[1] / times[0][0] / 1e6
            print(
                f"    {shape}: {times[0][1]},  # {model}: {times[0][0]:.1f} us, {rate:.2f} TB/s", flush=True
            )
            found[str(shape)] = [[round(us, 2), list(tile)] for us, tile in times]
    if sys.argv[1:]:
        with open(sys.argv[1], "w", encoding="utf-8") as out:
            json.dump({"device": torch.cuda.get_device_name(), "us": found}, out, indent=1)


if __name__ == "__main__":
    main()
