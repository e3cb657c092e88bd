"""How fast are the CPU's matrix kernels? GB/s of weights and GOPS of one linear layer, for each kind.

Weights are rotated through copies that together exceed every cache, as the layers of a model are; the time
includes quantising the activations and the hand-over to the threads. Each cell is timed in many short slices
that alternate over kinds, so that a busy neighbour hits all of them: the figures are the median slice, and
with --best the fastest tenth, which says what the kernel does while nobody disturbs it. Compare figures of
one run only.

    python benchmarks/cpu_matmul.py --threads 2                     # 2048 x 2048
    python benchmarks/cpu_matmul.py --rows 3072 --cols 576 --kinds Q4_MIN,Q8_GROUP --json out.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from slipstream.kernels.cpu.library import instruction_set, library
from slipstream.kernels.cpu.packed_matrix import SOURCES, Kind, PackedMatrix

TOKENS = (1, 4, 16, 64, 512)
# More than the last-level cache of any one socket's share.
COLD_BYTES = 192 << 20
SLICES = 60
SLICE_S = 0.001


def packed_copies(kind: Kind, rows: int, cols: int) -> list[PackedMatrix]:
    """Return enough matrices with random codes to exceed the caches. Scales are 2^-7: nothing overflows."""
    first = PackedMatrix.empty(kind, rows=rows, cols=cols)
    copies = max(1, COLD_BYTES // first.num_bytes)
    matrices = [first, *(PackedMatrix.empty(kind, rows=rows, cols=cols) for _ in range(copies - 1))]
    weights = torch.randn(rows, cols, generator=torch.Generator().manual_seed(0))
    fill(first, kind, weights)
    for matrix in matrices[1:]:
        matrix.data.copy_(first.data)
    return matrices


def fill(matrix: PackedMatrix, kind: Kind, weights: Tensor) -> None:
    if kind in (Kind.F32, Kind.Q8_ROW, Kind.Q8_GROUP):
        assert matrix.pack(weights, "F32")
    elif kind is Kind.BF16:
        assert matrix.pack(weights.bfloat16(), "BF16")
    else:
        # The kernels' time does not depend on the codes: bytes that are small as half floats too.
        source = next(name for name, (_, native) in SOURCES.items() if native is kind)
        block_columns, block_bytes = (256, 210) if source == "Q6_K" else (32, {4: 18, 5: 22}[int(source[1])])
        if kind in (Kind.Q4_MIN, Kind.Q5_MIN):
            block_bytes += 2
        size = (matrix.rows, matrix.cols // block_columns * block_bytes)
        stored = torch.randint(0, 32, size, generator=torch.Generator().manual_seed(0)).to(torch.uint8)
        assert matrix.pack(stored, source)


def product(matrices: list[PackedMatrix], tokens: int) -> Callable[[], None]:
    """Return a call that multiplies with the next matrix in turn."""
    native, first = library(), matrices[0]
    x = torch.randn(tokens, first.cols, generator=torch.Generator().manual_seed(1))
    y = torch.empty(tokens, first.rows)
    needed = native.ss_linear_scratch_bytes(int(first.kind), first.cols, tokens)
    scratch = torch.empty(needed, dtype=torch.uint8)
    turn = 0

    def call() -> None:
        nonlocal turn
        turn = (turn + 1) % len(matrices)
        address = matrices[turn].address
        native.ss_linear(address, x.data_ptr(), y.data_ptr(), tokens, None, scratch.data_ptr())

    return call


def slice_s(call: Callable[[], None], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def measure(calls: dict[Kind, Callable[[], None]], *, best: bool) -> dict[Kind, float]:
    """Return the seconds of one call of each, from slices that take turns."""
    repeats = {kind: max(1, int(SLICE_S / slice_s(call, 3))) for kind, call in calls.items()}
    slices: dict[Kind, list[float]] = {kind: [] for kind in calls}
    for _ in range(SLICES):
        for kind, call in calls.items():
            slices[kind].append(slice_s(call, repeats[kind]))
    if best:
        return {kind: sorted(times)[len(times) // 10] for kind, times in slices.items()}
    return {kind: statistics.median(times) for kind, times in slices.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--cols", type=int, default=2048, help="a multiple of 256")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--kinds", default=",".join(kind.name for kind in Kind))
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)))
    parser.add_argument("--best", action="store_true", help="the fastest tenth instead of the median")
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    arguments = parser.parse_args()

    library().ss_set_threads(arguments.threads)
    kinds = [Kind[name] for name in arguments.kinds.split(",")]
    matrices = {kind: packed_copies(kind, arguments.rows, arguments.cols) for kind in kinds}
    print(f"{instruction_set()}, {arguments.threads} threads, {arguments.rows} x {arguments.cols}")
    print(f"{'kind':<9} {'tokens':>6} {'us':>10} {'GB/s':>7} {'GOPS':>7}")
    records = []
    for tokens in map(int, arguments.tokens.split(",")):
        calls = {kind: product(matrices[kind], tokens) for kind in kinds}
        for kind, seconds in measure(calls, best=arguments.best).items():
            gb_per_s = matrices[kind][0].num_bytes / seconds / 1e9
            gops = 2e-9 * tokens * arguments.rows * arguments.cols / seconds
            print(
                f"{kind.name:<9} {tokens:>6} {seconds * 1e6:>10.1f} {gb_per_s:>7.1f} {gops:>7.1f}", flush=True
            )
            records.append({"kind": kind.name, "tokens": tokens, "seconds": seconds, "gops": gops})
    if arguments.json is not None:
        shape = {"rows": arguments.rows, "cols": arguments.cols, "threads": arguments.threads}
        arguments.json.write_text(
            json.dumps({"instructions": instruction_set(), **shape, "results": records})
        )


if __name__ == "__main__":
    main()
