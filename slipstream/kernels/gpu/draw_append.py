# pyright: reportMissingImports=false, reportIndexIssue=false
"""Which token does each random row of a step draw, and how does it get into its row? Two kernels on a GPU.

A program reads what its row asks for from the tables of the engine's rows and makes the row's noise. The
first kernel draws for rows without top-p, from all tokens (`full_draw.py`), the second for the others, from
their nucleus (`nucleus.py`); each appends what it drew and passes over the other's rows.
Invariant: the token, bit by bit, that these draw from a batch of such rows. A line whose row number is below
0 is not read, and nothing of it is written: what stands there was another kernel's.
R lines, V vocabulary, L tokens a row can hold; the tables have one line per row of the engine.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from slipstream.kernels.gpu.full_draw import LINES, WARPS, WIDTH, full_token
from slipstream.kernels.gpu.launching import launch_options, start_next, wait_for_previous
from slipstream.kernels.gpu.noise import ROUNDS, uniform_of
from slipstream.kernels.gpu.nucleus import (
    BLOCK,
    CAPACITY,
    MAX_ESTIMATES,
    MAX_REGISTERS,
    SLACK,
    nucleus_token,
)


@triton.jit
def _parameters(
    floats_ptr, ints_ptr, position_ptr, scale, TEMPERATURE: tl.constexpr, MIN_P: tl.constexpr,
    KEY: tl.constexpr, SAMPLE_IDX: tl.constexpr, ROUNDS: tl.constexpr,
):  # fmt: skip
    """Return what a batch has of a row: temperature in float32, the mass that min-p asks for, and noise."""
    temperature = tl.load(floats_ptr + TEMPERATURE).to(tl.float32)
    min_mass = tl.ceil(tl.load(floats_ptr + MIN_P) * scale).to(tl.int64)
    key0, key1 = tl.load(ints_ptr + KEY), tl.load(ints_ptr + KEY + 1)
    sample_idx, position = tl.load(ints_ptr + SAMPLE_IDX), tl.load(position_ptr)
    return temperature, min_mass, uniform_of(key0, key1, sample_idx, position, ROUNDS)


@triton.jit
def _append(
    token, status, line, row, out_ptr, num_lines, position_ptr, tokens_ptr, lengths_ptr, tokens_stride,
    longest,
):  # fmt: skip
    """Leave a line's token and status, and lengthen its row by the token."""
    tl.store(out_ptr + line, token)
    tl.store(out_ptr + num_lines + line, status.to(tl.int64))
    tl.store(position_ptr + row, tl.load(position_ptr + row) + 1)
    length = tl.load(lengths_ptr + row)
    tl.store(tokens_ptr + row * tokens_stride + length, token.to(tl.int32), mask=length < longest)
    tl.store(lengths_ptr + row, length + 1)


@triton.jit(
    do_not_specialize=["num_lines"],
    do_not_specialize_on_alignment=["rows_ptr", "out_ptr"],
)
def _draw_full_rows(
    x_ptr, rows_ptr, floats_ptr, ints_ptr, position_ptr, tokens_ptr, lengths_ptr, out_ptr, sums_ptr,
    line_stride, floats_stride, ints_stride, tokens_stride, longest, num_lines, vocab, num_blocks, scale,
    TEMPERATURE: tl.constexpr, TOP_P: tl.constexpr, MIN_P: tl.constexpr, KEY: tl.constexpr,
    SAMPLE_IDX: tl.constexpr, ROUNDS: tl.constexpr, BLOCKS: tl.constexpr, LINES: tl.constexpr,
    WIDTH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    line = tl.program_id(0).to(tl.int64)
    start_next(PDL)
    wait_for_previous(PDL)
    row = tl.load(rows_ptr + line)
    if row < 0:
        return
    floats_ptr += row * floats_stride
    if tl.load(floats_ptr + TOP_P) < 1.0:
        return
    temperature, min_mass, uniform = _parameters(
        floats_ptr, ints_ptr + row * ints_stride, position_ptr + row, scale, TEMPERATURE, MIN_P, KEY,
        SAMPLE_IDX, ROUNDS,
    )  # fmt: skip
    token, status = full_token(
        x_ptr + line * line_stride, vocab, temperature, min_mass, uniform, sums_ptr + line * num_blocks,
        num_blocks, scale, BLOCKS, LINES, WIDTH,
    )  # fmt: skip
    _append(
        token, status, line, row, out_ptr, num_lines, position_ptr, tokens_ptr, lengths_ptr, tokens_stride,
        longest,
    )  # fmt: skip


@triton.jit(
    do_not_specialize=["num_lines"],
    do_not_specialize_on_alignment=["rows_ptr", "out_ptr"],
)
def _draw_nucleus_rows(
    x_ptr, rows_ptr, floats_ptr, ints_ptr, position_ptr, tokens_ptr, lengths_ptr, out_ptr, listed_ptr,
    ids_ptr, line_stride, floats_stride, ints_stride, tokens_stride, longest, num_lines, vocab, scale,
    slack_share, TEMPERATURE: tl.constexpr, TOP_P: tl.constexpr, MIN_P: tl.constexpr, KEY: tl.constexpr,
    SAMPLE_IDX: tl.constexpr, ROUNDS: tl.constexpr, BITS: tl.constexpr, CAPACITY: tl.constexpr,
    MAX_ESTIMATES: tl.constexpr, LINES: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    line = tl.program_id(0).to(tl.int64)
    start_next(PDL)
    wait_for_previous(PDL)
    row = tl.load(rows_ptr + line)
    if row < 0:
        return
    floats_ptr += row * floats_stride
    top_p = tl.load(floats_ptr + TOP_P)
    if top_p >= 1.0:
        return
    temperature, min_mass, uniform = _parameters(
        floats_ptr, ints_ptr + row * ints_stride, position_ptr + row, scale, TEMPERATURE, MIN_P, KEY,
        SAMPLE_IDX, ROUNDS,
    )  # fmt: skip
    token, status = nucleus_token(
        x_ptr + line * line_stride, vocab, temperature, top_p, min_mass, uniform,
        listed_ptr + line * CAPACITY, ids_ptr + line * CAPACITY, scale, slack_share,
        BITS, CAPACITY, MAX_ESTIMATES, LINES, WIDTH, BLOCK,
    )  # fmt: skip
    _append(
        token, status, line, row, out_ptr, num_lines, position_ptr, tokens_ptr, lengths_ptr, tokens_stride,
        longest,
    )  # fmt: skip


def draw_append(
    logits_RV: Tensor,
    rows_R: Tensor,
    tables: tuple[Tensor, Tensor, Tensor],
    tokens_RL: Tensor,
    lengths_R: Tensor,
    out_2R: Tensor,
    *,
    columns: tuple[int, int, int, int, int],
    bits: int,
    capacity: int = CAPACITY,
) -> None:
    """Write token ids and statuses to `out_2R` int64, append the tokens to their distinct rows, count them.

    `logits_RV` are float32 with adjacent elements. `tables` are floats float64 and ints int64, whose
    `columns` are temperature, top-p, min-p, the first of the key's two words and the sample index, and the
    position int64 of each row's next token. Lists hold `capacity` tokens. Only enqueues.
    """
    assert logits_RV.dtype == torch.float32 and logits_RV.stride(1) == 1
    lines, vocab = logits_RV.shape
    floats, ints, _ = tables
    num_blocks = triton.cdiv(vocab, LINES * WIDTH)
    device = logits_RV.device
    sums = torch.empty(lines, num_blocks, dtype=torch.int64, device=device)
    listed = torch.empty(lines, capacity, dtype=torch.float32, device=device)
    ids = torch.empty(lines, capacity, dtype=torch.int32, device=device)
    places = (logits_RV, rows_R, *tables, tokens_RL, lengths_R, out_2R)
    sizes = (logits_RV.stride(0), floats.stride(0), ints.stride(0), tokens_RL.stride(0), tokens_RL.shape[1])
    names = ("TEMPERATURE", "TOP_P", "MIN_P", "KEY", "SAMPLE_IDX")
    options = {
        **dict(zip(names, columns, strict=True)),
        **launch_options(logits_RV),
        "ROUNDS": ROUNDS,
        "num_warps": WARPS,
    }
    _draw_full_rows[(lines,)](
        *places, sums, *sizes, lines, vocab, num_blocks, 2.0**bits, BLOCKS=triton.next_power_of_2(num_blocks),
        LINES=LINES, WIDTH=WIDTH, **options,
    )  # fmt: skip
    _draw_nucleus_rows[(lines,)](
        *places, listed, ids, *sizes, lines, vocab, 2.0**bits, SLACK, BITS=bits, CAPACITY=capacity,
        MAX_ESTIMATES=MAX_ESTIMATES, LINES=LINES, WIDTH=WIDTH, BLOCK=BLOCK, maxnreg=MAX_REGISTERS, **options,
    )  # fmt: skip
