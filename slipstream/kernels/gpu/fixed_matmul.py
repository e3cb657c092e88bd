# pyright: reportMissingImports=false, reportIndexIssue=false
"""How do tokens meet a matrix on a GPU with the same bits, however many they are? Summed up in one order.

The inputs are cut into parts of a fixed length; a part is summed up from zero in steps of one size, and the
parts are added in their order. Where there are few tiles, programs take a part each and a second kernel adds
the parts up; where there are many, one program takes the parts of its tile in turn: the same sums in the same
order. A matrix unit adds up the 16 inputs of an instruction for each element alike, whatever tile it is in,
so that in 16 bits many tokens may meet larger tiles; in float32 all tiles have one shape. Where it can be
had, `queued_matmul.py` is faster, with other bits.
Invariant: what a line of `x` gives depends on that line and the weights.
T tokens, I inputs, O outputs, P parts.
"""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl
from torch import Tensor

from slipstream.kernels.gpu.launching import launch_options, sms_of, start_next, wait_for_previous

BLOCK_I, BLOCK_I_FLOAT32 = 64, 32
# A multiple of both steps. Part of what a result is: another length gives other bits.
PART = 2048
# With fewer tiles than this many for each multiprocessor, some would idle: parts go to programs of their own.
MIN_TILES_PER_SM = 2
BLOCK_JOIN = 1024


@dataclasses.dataclass(frozen=True, slots=True)
class Shape:
    """A tile of tokens and outputs, and how a program runs. None of it changes a bit of a 16-bit product."""

    BLOCK_T: int
    BLOCK_O: int
    num_warps: int
    num_stages: int


# 64 lines are the least that a Hopper matrix unit takes at once; 64 outputs keep enough programs at work.
FEW = Shape(64, 64, 4, 4)
MANY = Shape(128, 128, 8, 4)
EXACT = Shape(64, 64, 4, 1)
# From so many tokens on the larger tiles keep all multiprocessors at work.
MANY_TOKENS = 512


@triton.jit
def _sum_part(
    x_lines, w_lines, first, inputs, is_token, is_output, i,
    BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, PART: tl.constexpr,
    IS_EVEN: tl.constexpr, IS_EXACT: tl.constexpr,
):  # fmt: skip
    """Return the sum over the inputs [first, first + PART) of a tile, from zero."""
    acc = tl.zeros((BLOCK_T, BLOCK_O), tl.float32)
    for at in range(first, tl.minimum(first + PART, inputs), BLOCK_I):
        if IS_EVEN:
            x = tl.load(x_lines + (at + i)[None, :], mask=is_token[:, None], other=0.0)
            w = tl.load(w_lines + (at + i)[None, :], mask=is_output[:, None], other=0.0)
        else:
            is_input = (at + i < inputs)[None, :]
            x = tl.load(x_lines + (at + i)[None, :], mask=is_token[:, None] & is_input, other=0.0)
            w = tl.load(w_lines + (at + i)[None, :], mask=is_output[:, None] & is_input, other=0.0)
        if IS_EXACT:
            acc += tl.dot(x, tl.trans(w), input_precision="ieee")
        else:
            acc = tl.dot(x, tl.trans(w), acc)
    return acc


@triton.jit(
    do_not_specialize=["tokens"],
)
def _fixed_matmul(
    x_ptr, w_ptr, y_ptr, parts_ptr, tokens, outputs, inputs, x_stride, w_stride,
    BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, PART: tl.constexpr,
    IS_SPLIT: tl.constexpr, IS_EVEN: tl.constexpr, IS_EXACT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    start_next(PDL)
    t = tl.program_id(1).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    o = tl.program_id(0).to(tl.int64) * BLOCK_O + tl.arange(0, BLOCK_O)
    i = tl.arange(0, BLOCK_I)
    is_token, is_output = t < tokens, o < outputs
    x_lines, w_lines = x_ptr + t[:, None] * x_stride, w_ptr + o[:, None] * w_stride
    place = t[:, None] * outputs + o[None, :]
    is_there = is_token[:, None] & is_output[None, :]
    wait_for_previous(PDL)
    if IS_SPLIT:
        part = tl.program_id(2)
        acc = _sum_part(
            x_lines, w_lines, part * PART, inputs, is_token, is_output, i,
            BLOCK_T, BLOCK_O, BLOCK_I, PART, IS_EVEN, IS_EXACT,
        )  # fmt: skip
        tl.store(parts_ptr + part.to(tl.int64) * tokens * outputs + place, acc, mask=is_there)
    else:
        total = tl.zeros((BLOCK_T, BLOCK_O), tl.float32)
        for first in range(0, inputs, PART):
            total += _sum_part(
                x_lines, w_lines, first, inputs, is_token, is_output, i,
                BLOCK_T, BLOCK_O, BLOCK_I, PART, IS_EVEN, IS_EXACT,
            )  # fmt: skip
        tl.store(y_ptr + place, total.to(y_ptr.dtype.element_ty), mask=is_there)


@triton.jit(do_not_specialize=["size", "parts"])
def _join_parts(parts_ptr, y_ptr, size, parts, BLOCK: tl.constexpr, PDL: tl.constexpr):
    start_next(PDL)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    wait_for_previous(PDL)
    total = tl.zeros((BLOCK,), tl.float32)
    place = parts_ptr + at
    for _ in range(0, parts):
        total += tl.load(place, mask=at < size, other=0.0)
        place += size
    tl.store(y_ptr + at, total.to(y_ptr.dtype.element_ty), mask=at < size)


def fixed_matmul(
    x_TI: Tensor, weight_OI: Tensor, *, is_split: bool | None = None, shape: Shape | None = None
) -> Tensor:
    """Return x @ W^T, [T, O] in x's type. Only enqueues.

    `is_split` says who takes the parts, and `shape` in which tiles, which changes no bit in 16 bits; left
    open they follow from the number of tokens.
    """
    x_TI = x_TI if x_TI.stride(-1) == 1 else x_TI.contiguous()
    tokens, inputs = x_TI.shape
    outputs = weight_OI.shape[0]
    y = torch.empty(tokens, outputs, dtype=x_TI.dtype, device=x_TI.device)
    if tokens == 0:
        return y
    is_exact = x_TI.dtype == torch.float32
    if shape is None:
        shape = EXACT if is_exact else MANY if tokens >= MANY_TOKENS else FEW
    block_i = BLOCK_I_FLOAT32 if is_exact else BLOCK_I
    tiles = (triton.cdiv(outputs, shape.BLOCK_O), triton.cdiv(tokens, shape.BLOCK_T))
    parts = triton.cdiv(inputs, PART)
    if is_split is None:
        is_split = tiles[0] * tiles[1] < MIN_TILES_PER_SM * sms_of(x_TI) and shape is not MANY
    is_split = is_split and parts > 1
    scratch = torch.empty(parts, tokens, outputs, dtype=torch.float32, device=x_TI.device) if is_split else y
    options = launch_options(x_TI)
    # Outputs first: programs that share their tokens follow one another, and find them in the cache.
    _fixed_matmul[(*tiles, parts if is_split else 1)](
        x_TI, weight_OI, y, scratch, tokens, outputs, inputs, x_TI.stride(0), weight_OI.stride(0),
        BLOCK_I=block_i, PART=PART, IS_SPLIT=is_split, IS_EVEN=inputs % block_i == 0, IS_EXACT=is_exact,
        **dataclasses.asdict(shape), **options,
    )  # fmt: skip
    if is_split:
        size = tokens * outputs
        _join_parts[(triton.cdiv(size, BLOCK_JOIN),)](scratch, y, size, parts, BLOCK=BLOCK_JOIN, **options)
    return y
