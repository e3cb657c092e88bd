# pyright: reportMissingImports=false, reportIndexIssue=false
"""Which token does a random row draw from all of its tokens, or those that min-p allows, on a GPU?

A program reads its row for the largest logit, then for the integer masses, whose sums over blocks it keeps,
then the block that the draw falls into. Invariant: the token that `draw_full` of `sampling/filters.py` finds,
bit by bit: the first, in the order of ids, at which the cumulative mass passes u times the total.
N rows, V vocabulary, B blocks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from slipstream.kernels.gpu.nucleus import OK, integer_mass, status_of

# Lines of tokens at once, their width, and warps: two programs share a multiprocessor.
LINES, WIDTH = 4, 1024
WARPS = 8


@triton.jit
def full_token(
    x_ptr, vocab, temperature, min_mass, uniform, sums_ptr, num_blocks, scale, BLOCKS: tl.constexpr,
    LINES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Return the token that a row draws, int64, and its status, int32; `sums_ptr` has room for all blocks."""
    v = tl.arange(0, LINES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    most = tl.full((WIDTH,), float("-inf"), tl.float32)
    for at in range(0, vocab, LINES * WIDTH):
        x = tl.load(x_ptr + at + v, mask=at + v < vocab, other=float("-inf"))
        most = tl.maximum(most, tl.max(tl.where(x != x, float("inf"), x), 0))
    largest = tl.max(most, 0)
    status = status_of(largest)
    token = tl.full((), 0, tl.int64)
    if status == OK:
        for at in range(0, vocab, LINES * WIDTH):
            x = tl.load(x_ptr + at + v, mask=at + v < vocab, other=float("-inf"))
            mass = integer_mass(x, largest, temperature, scale)
            mass = tl.where(mass >= min_mass, mass, 0)
            tl.store(sums_ptr + at // (LINES * WIDTH), tl.sum(tl.sum(mass, 0), 0))
        # What one thread has written, others read.
        tl.debug_barrier()
        b = tl.arange(0, BLOCKS)
        sums = tl.load(sums_ptr + b, mask=b < num_blocks, other=0)
        ends, total = tl.cumsum(sums, 0), tl.sum(sums, 0)
        target = (uniform * total.to(tl.float64)).to(tl.int64)
        target = tl.minimum(target, total - 1)
        is_before = ends <= target
        block = tl.sum(is_before.to(tl.int32), 0)
        target -= tl.sum(tl.where(is_before, sums, 0), 0)
        u = block * (LINES * WIDTH) + tl.arange(0, LINES * WIDTH)
        x = tl.load(x_ptr + u, mask=u < vocab, other=float("-inf"))
        mass = integer_mass(x, largest, temperature, scale)
        mass = tl.where(mass >= min_mass, mass, 0)
        place = tl.sum((tl.cumsum(mass, 0) <= target).to(tl.int32), 0)
        token = (block * (LINES * WIDTH) + place).to(tl.int64)
    return token, status


@triton.jit(
    do_not_specialize=["uniform_stride", "num_blocks", "has_min"],
    do_not_specialize_on_alignment=["temperature_ptr", "min_mass_ptr", "uniform_ptr"],
)
def _draw_full(
    x_ptr, temperature_ptr, min_mass_ptr, uniform_ptr, sums_ptr, out_ptr, status_ptr, row_stride,
    uniform_stride, has_min, vocab, num_blocks, scale, BLOCKS: tl.constexpr,
    LINES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    temperature, uniform = tl.load(temperature_ptr + row), tl.load(uniform_ptr + row * uniform_stride)
    min_mass = tl.load(min_mass_ptr + row, mask=has_min != 0, other=0)
    token, status = full_token(
        x_ptr + row * row_stride, vocab, temperature, min_mass, uniform, sums_ptr + row * num_blocks,
        num_blocks, scale, BLOCKS, LINES, WIDTH,
    )  # fmt: skip
    tl.store(out_ptr + row, token)
    tl.store(status_ptr + row, status.to(tl.int8))


def draw_full(
    x_NV: Tensor, temperature_N: Tensor, min_mass_N: Tensor | None, uniform_N: Tensor, *, bits: int
) -> tuple[Tensor, Tensor]:
    """Return one token id per row, int64 [N], and whether it is sound, int8 [N], as `draw_nucleus` does."""
    assert temperature_N.is_contiguous()
    rows, vocab = x_NV.shape
    num_blocks = triton.cdiv(vocab, LINES * WIDTH)
    out_N = torch.empty(rows, dtype=torch.int64, device=x_NV.device)
    status_N = torch.empty(rows, dtype=torch.int8, device=x_NV.device)
    sums = torch.empty(rows, num_blocks, dtype=torch.int64, device=x_NV.device)
    _draw_full[(rows,)](
        x_NV, temperature_N, out_N if min_mass_N is None else min_mass_N, uniform_N, sums, out_N, status_N,
        x_NV.stride(0), uniform_N.stride(0), int(min_mass_N is not None), vocab, num_blocks, 2.0**bits,
        BLOCKS=triton.next_power_of_2(num_blocks), LINES=LINES, WIDTH=WIDTH, num_warps=WARPS,
    )  # fmt: skip
    return out_N, status_N
