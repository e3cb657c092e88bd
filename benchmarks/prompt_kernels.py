"""How near their floor are the small kernels between a prompt's products? On a GPU, in shapes of an 8B model.

Rotary positions with the cache write, the sum with its norm, the gated activation: each captured in a graph
over inputs larger than the L2, medians, beside what its bytes take at the speed of a copy. Each is held
against its definition before it is timed.

    python benchmarks/prompt_kernels.py [--out prompt_kernels.json]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from graph_timing import replayed_us

from slipstream.kernels.rms_norm import add_rms_norm, add_rms_norm_op
from slipstream.kernels.rotary_store import rotary_store, rotary_store_op
from slipstream.kernels.silu_and_mul import silu_and_mul, silu_and_mul_op

HIDDEN, INTER, HEADS, KV_HEADS, SIZE, PAGE = 4096, 14336, 32, 8, 128, 32
REPLAYS = 12
# Bytes that a graph's inputs must exceed together: twice the L2 of an H100.
PAST_L2 = 100 << 20
# Of values of a size of 1 to 4, rounded to bfloat16 once more or once less.
TOLERANCE = 4e-2


def graph_us(calls: list[Callable[[], Any]]) -> float:
    """Return the median time of one of some calls that are replayed as one graph."""
    for call in calls[:2]:
        call()

    def run() -> None:
        for call in calls:
            call()

    return replayed_us(run, count=len(calls), runs=REPLAYS, skipped=2)


def copy_speed() -> float:
    """Return how many bytes a second the device reads and writes when it copies."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    us = graph_us([lambda: target.copy_(source)] * 4)
    return 2 * source.numel() / us * 1e6


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


class Case:
    """One kernel at a number of tokens: its calls on several inputs, its definition, the bytes it moves."""

    def __init__(self, name: str, tokens: int) -> None:
        self.name, self.tokens = name, tokens
        width = {"gate": 3 * INTER, "add and norm": 4 * HIDDEN, "rotary": 2 * (HEADS + 2 * KV_HEADS) * SIZE}
        self.num_bytes = 2 * tokens * width[name]
        self.copies = max(2, -(-PAST_L2 // self.num_bytes))
        self.inputs = [getattr(self, "make_" + name.replace(" ", "_"))() for _ in range(self.copies)]

    def make_gate(self) -> tuple[Any, ...]:
        return silu_and_mul_op, silu_and_mul, (draw(self.tokens, 2 * INTER),)

    def make_add_and_norm(self) -> tuple[Any, ...]:
        weight = torch.ones(HIDDEN, device="cuda")
        lines = (draw(self.tokens, HIDDEN), draw(self.tokens, HIDDEN))
        return add_rms_norm_op, add_rms_norm, (*lines, weight, 1e-5)

    def make_rotary(self) -> tuple[Any, ...]:
        pages = self.tokens // PAGE + 1
        positions = torch.arange(self.tokens, device="cuda")
        table = torch.randn(self.tokens, 2, SIZE, device="cuda")
        table[:, :, SIZE // 2 :] = table[:, :, : SIZE // 2]
        table[:, 1, : SIZE // 2] *= -1
        qkv = draw(self.tokens, (HEADS + 2 * KV_HEADS) * SIZE)
        pool = torch.zeros(pages, 2, PAGE, KV_HEADS, SIZE, device="cuda", dtype=torch.bfloat16)
        norms = (None, None, 0.0, False)
        return rotary_store_op, rotary_store, (qkv, table, positions, *norms, HEADS, pool, positions + PAGE)

    def check(self) -> None:
        op, definition, arguments = self.inputs[0]
        given, expected = op(*arguments), definition(*arguments)
        pairs = zip(given, expected, strict=True) if isinstance(given, tuple) else [(given, expected)]
        for one, other in pairs:
            error = float((one.float() - other.float()).abs().max())
            if not error <= TOLERANCE:
                raise SystemExit(f"{self.name} of {self.tokens} tokens is off by {error}; nothing is timed")

    def time_us(self) -> float:
        self.check()
        return graph_us([lambda op=op, given=given: op(*given) for op, _, given in self.inputs])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.manual_seed(0)
    speed = copy_speed()
    print(f"a copy runs at {speed / 1e12:.2f} TB/s")
    rows = []
    for tokens in (2048, 512):
        for name in ("gate", "add and norm", "rotary"):
            case = Case(name, tokens)
            us, floor_us = case.time_us(), case.num_bytes / speed * 1e6
            rows.append({"kernel": name, "tokens": tokens, "us": us, "floor_us": floor_us})
            print(f"{name}, {tokens} tokens: {us:.1f} us, floor {floor_us:.1f}", flush=True)
    if given.out is not None:
        record = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "rows": rows}
        given.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
