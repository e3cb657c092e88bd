"""What does a tree of drafts cost in attention, beside an ordinary span and beside a row for each token?

Llama-3.1-8B's heads over pages of 32 tokens in bfloat16; as many layers as the L2 cannot hold, their calls in
one CUDA graph. Each tree's output, poisoned, is first compared with float64 over walked paths. A row for each
token is what trees replace: no mask, and every token reads the context for itself.

Bytes are keys and values read once, operations 4 x heads x head size x queries x keys. Predicted for an H100
(3.02 TB/s, 800 TFLOP/s), microseconds a layer, span / tree:
  64 at 4160        17 MB, 4.4 GFLOP: floor 5.6; 16 / 17
  16 at 4160        17 MB, 1.1 GFLOP: floor 5.6; 13 / 14
  8 at 32768        134 MB, 4.3 GFLOP: floor 44; 62 / 63
  32 x 16 at 2048   268 MB, 17 GFLOP: floor 89; 120 / 124
A tree masks the two tiles of keys that hold it and reads 8 bytes a token: 1 us, or 4% where tiles are many.

    python benchmarks/tree_attention.py [--out tree_attention.json]
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import random
from collections.abc import Callable
from pathlib import Path

import torch
from graph_timing import replayed_us
from torch import Tensor

from slipstream.kernels.balanced_decode import balanced_decode_op
from slipstream.kernels.decode_borders import decode_borders_op
from slipstream.kernels.decode_shares import keys_of_unit, num_programs
from slipstream.kernels.gpu.paged_prefill import paged_prefill
from slipstream.kernels.paged_decode import NUM_COUNTERS
from slipstream.kernels.query_tiles import tile_queries
from slipstream.kernels.tree_masks import tree_of

DEVICE, DTYPE = "cuda", torch.bfloat16
HEADS, KV_HEADS, SIZE, PAGE = 32, 8, 128, 32
ROTATED_BYTES = 256 << 20
RUNS = 12
# Half a unit of bfloat16 of a value of at most about 3.
TOLERANCE = 2e-2
# Rows, drafted tokens of each, length behind them.
CASES = {
    "64 at 4160": (1, 64, 4160),
    "16 at 4160": (1, 16, 4160),
    "8 at 32768": (1, 8, 32768),
    "32 x 16 at 2048": (32, 16, 2048),
}


@dataclasses.dataclass
class Step:
    """One case on the GPU: `pages` hold some layers, of which each call reads one."""

    rows: int
    count: int
    length: int

    def __post_init__(self) -> None:
        draw = torch.Generator(DEVICE).manual_seed(0)
        rng = random.Random(0)
        parents = [-1]
        while len(parents) < self.count:
            parents.append(rng.randrange(max(0, len(parents) - 4), len(parents)))
        self.parents = tuple(parents)
        blocks = -(-self.length // PAGE)
        num_pages = self.rows * blocks + 1
        layer_bytes = num_pages * 2 * PAGE * KV_HEADS * SIZE * 2
        self.layers = max(2, -(-ROTATED_BYTES // layer_bytes))
        shape = (self.layers, num_pages, 2, PAGE, KV_HEADS, SIZE)
        self.pages = torch.randn(shape, generator=draw, device=DEVICE, dtype=DTYPE)
        order = torch.randperm(num_pages - 1, generator=draw, device=DEVICE).int() + 1
        self.table = order.view(self.rows, blocks)
        # Behind the end, and in the last draft, which is nobody's parent.
        self.pages[:, 0] = float("nan")
        last = self.table[:, -1].long()
        self.pages[:, last, :, (self.length - 1) % PAGE :] = float("nan")
        tokens = self.rows * self.count
        self.q = torch.randn(tokens, HEADS, SIZE, generator=draw, device=DEVICE, dtype=DTYPE)
        self.out = torch.full_like(self.q, float("nan"))
        self.lens = torch.full((self.rows,), self.length, device=DEVICE)
        self.start = torch.arange(self.rows + 1, device=DEVICE) * self.count
        step = tile_queries(DTYPE)
        tiles = [(row, at) for row in range(self.rows) for at in range(0, self.count, step)]
        self.tiles = torch.tensor(tiles, dtype=torch.int32, device=DEVICE)
        self.tree = torch.tensor(list(tree_of(self.parents).bits) * self.rows, device=DEVICE)
        self.counters = torch.zeros(NUM_COUNTERS, dtype=torch.int32, device=DEVICE)

    @property
    def num_bytes(self) -> int:
        return self.rows * self.length * 2 * KV_HEADS * SIZE * 2

    @property
    def num_operations(self) -> int:
        return 4 * HEADS * SIZE * self.rows * self.count * self.length

    def attend(self, layer: int, tree: Tensor | None, window: int = 0, softcap: float = 0.0) -> None:
        where = (self.table, self.lens, self.start, self.tiles, self.out)
        settings = (SIZE**-0.5, window, softcap, self.counters, tree)
        paged_prefill(self.q, self.pages[layer], *where, *settings)

    def rows_of_tokens(self) -> Callable[[int], None]:
        """Return a call that runs each token as a row of its own, which sees all keys."""
        table = self.table.repeat_interleave(self.count, 0)
        lens = self.lens.repeat_interleave(self.count)
        cut = (KV_HEADS, keys_of_unit(DTYPE, SIZE), 0, num_programs(self.q.device))
        borders = decode_borders_op(lens, None, *cut)
        tail = (table, lens, borders, self.out, self.counters, SIZE**-0.5, 0, 0.0)
        return lambda layer: balanced_decode_op(self.q, self.pages[layer], *tail)

    def expected(self, row: int, offset: int, window: int, softcap: float) -> Tensor:
        """Return [N, H] in float64 for a token, from its path alone."""
        path: list[int] = []
        at = offset
        while at >= 0:
            path.insert(0, self.length - self.count + at)
            at = self.parents[at]
        seen = [*range(self.length - self.count), *path]
        position = torch.tensor(seen[-window:] if window else seen, device=DEVICE)
        kv = self.pages[0, self.table[row, position // PAGE].long(), :, position % PAGE].double()
        k, v = kv.repeat_interleave(HEADS // KV_HEADS, 2).unbind(1)
        scores = torch.einsum("nh,lnh->nl", self.q[row * self.count + offset].double(), k) * SIZE**-0.5
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        return torch.einsum("nl,lnh->nh", scores.softmax(-1), v)

    def check(self) -> float:
        """Return the largest error of some tokens of the first and last row; SystemExit for a wrong one."""
        worst = 0.0
        for window, softcap in ((0, 0.0), (5, 0.0), (1000, 20.0)):
            self.out.fill_(float("nan"))
            self.attend(0, self.tree, window, softcap)
            for row, offset in itertools.product({0, self.rows - 1}, (0, self.count // 2, self.count - 2)):
                given = self.out[row * self.count + offset].double()
                error = float((given - self.expected(row, offset, window, softcap)).abs().max())
                if not error <= TOLERANCE:
                    raise SystemExit(f"token {offset} of row {row} is off by {error}, window {window}")
                worst = max(worst, error)
            if not bool(self.out[self.count - 1 :: self.count].isnan().all()):
                raise SystemExit("the draft whose values are NaN did not say so")
        if bool(self.counters.any()):
            raise SystemExit("counters are left behind")
        return worst

    def time(self, call: Callable[[int], None]) -> float:
        """Return microseconds a layer, the median of some replays."""
        call(0)
        layers = range(self.layers)
        return replayed_us(lambda: [call(layer) for layer in layers], count=self.layers, runs=RUNS)


def measure(step: Step) -> dict[str, float]:
    error = step.check()
    # Timed without NaN.
    step.pages.nan_to_num_(0.0)
    floor = max(step.num_bytes / 3.02e6, step.num_operations / 800e6)
    return {
        "floor_us": round(floor, 1),
        "span_us": round(step.time(lambda layer: step.attend(layer, None)), 1),
        "tree_us": round(step.time(lambda layer: step.attend(layer, step.tree)), 1),
        "rows_us": round(step.time(step.rows_of_tokens()), 1),
        "error": round(error, 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    results: dict[str, dict[str, float]] = {}
    for name, numbers in CASES.items():
        results[name] = measure(Step(*numbers))
        print(name, json.dumps(results[name]), flush=True)
        torch.cuda.empty_cache()
    record = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "cases": results}
    if given.out is not None:
        given.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
