"""What do products of one shape cost on a GPU, beside the library's and beside reading the weights?

The linear layers of Llama-3.1-8B at several numbers of tokens, weights rotated through more than the cache
holds; a figure is the median of the runs. Bits of single tokens are compared with those of the whole.

    python benchmarks/fixed_matmul.py [--tokens 1,64,256,2048] [--out fixed_matmul.json]
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import linear

from slipstream.kernels.gpu.fixed_matmul import FEW, MANY, Shape, fixed_matmul

SHAPES = {"qkv": (6144, 4096), "output": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
SHAPES_TRIED = {
    "few": FEW,
    "many": MANY,
    "64x128": Shape(64, 128, 4, 4),
    "128x256": Shape(128, 256, 8, 3),
}
ROTATED_BYTES = 400 << 20
NUM_RUNS = 30


def median_us(call: Callable[[int], Any]) -> float:
    for i in range(3):
        call(i)
    times: list[float] = []
    for i in range(NUM_RUNS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call(i)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return statistics.median(times)


def measure(name: str, tokens: int) -> dict[str, Any]:
    outputs, inputs = SHAPES[name]
    copies = max(2, ROTATED_BYTES // (2 * outputs * inputs))
    weights = [torch.randn(outputs, inputs, device="cuda", dtype=torch.bfloat16) / 64 for _ in range(copies)]
    x = torch.randn(tokens, inputs, device="cuda", dtype=torch.bfloat16)
    whole = fixed_matmul(x, weights[0])
    for token in {0, tokens // 2, tokens - 1}:
        assert torch.equal(fixed_matmul(x[token : token + 1], weights[0])[0], whole[token]), (name, tokens)
    for is_split, shape in itertools.product((False, True), SHAPES_TRIED.values()):
        given = fixed_matmul(x, weights[0], is_split=is_split, shape=shape)
        assert torch.equal(given, whole), (name, tokens, is_split, shape)
    tried = {
        key: round(median_us(lambda i: fixed_matmul(x, weights[i % copies], is_split=False, shape=shape)), 1)  # noqa: B023
        for key, shape in SHAPES_TRIED.items()
    }
    error = (whole.float() - linear(x.float(), weights[0].float())).abs().max()
    assert float(error) < 0.1, (name, tokens, float(error))
    fixed = median_us(lambda i: fixed_matmul(x, weights[i % copies]))
    library = median_us(lambda i: linear(x, weights[i % copies]))
    return {
        "layer": name,
        "tokens": tokens,
        "fixed_us": fixed,
        "library_us": library,
        "ratio": fixed / library,
        "tried_us": tried,
        "weights_gb_per_s": 2 * outputs * inputs / fixed / 1e3,
        "tflop_per_s": 2 * tokens * outputs * inputs / fixed / 1e6,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", default="1,64,256,2048")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    sizes = [int(size) for size in given.tokens.split(",")]
    rows = [measure(name, tokens) for tokens in sizes for name in SHAPES]
    record = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "rows": rows}
    for row in rows:
        print(json.dumps(row))
    if given.out is not None:
        given.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
