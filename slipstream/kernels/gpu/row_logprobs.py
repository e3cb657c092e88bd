# pyright: reportMissingImports=false, reportIndexIssue=false
"""How likely is a token, and which rank has it, in one pass over a row of logits on a GPU?

The definition is `sampling/logprobs.py`. Invariant: masses are exact integers, floor(2^bits exp(x - max)), by
the exponential that torch uses, so a row's numbers do not depend on its batch.
L rows, V vocabulary, K leaders.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

# Lines of tokens at once, their width, and warps: two programs share a multiprocessor.
LINES, WIDTH = 4, 1024
WARPS = 8
NUM_SCALARS = tl.constexpr(4)


@triton.jit
def store_logprobs(
    x_ptr, token, status, largest, values_ptr, ids_ptr, out_ptr, vocab, num_top, num_columns, scale,
    LOG_SCALE: tl.constexpr, K: tl.constexpr, LINES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Write a row's scalars, then `num_top` ids and as many logprobs, each with room for `num_columns`."""
    chosen = tl.load(x_ptr + token)
    v = tl.arange(0, LINES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    totals, greater = tl.zeros((WIDTH,), tl.int64), tl.zeros((WIDTH,), tl.int32)
    for at in range(0, vocab, LINES * WIDTH):
        x = tl.load(x_ptr + at + v, mask=at + v < vocab, other=float("-inf"))
        totals += tl.sum((libdevice.exp(x - largest) * scale).to(tl.int64), 0)
        greater += tl.sum((x > chosen).to(tl.int32), 0)
    norm = largest.to(tl.float64) + tl.log(tl.sum(totals, 0).to(tl.float64))
    norm -= tl.full((), LOG_SCALE, tl.float64)
    tl.store(out_ptr, token.to(tl.float64))
    tl.store(out_ptr + 1, chosen.to(tl.float64) - norm)
    tl.store(out_ptr + 2, (tl.sum(greater, 0) + 1).to(tl.float64))
    tl.store(out_ptr + 3, status.to(tl.float64))
    k = tl.arange(0, K)
    values = tl.load(values_ptr + k, mask=k < num_top, other=0.0)
    ids = tl.load(ids_ptr + k, mask=k < num_top, other=0)
    tl.store(out_ptr + NUM_SCALARS + k, ids.to(tl.float64), mask=k < num_top)
    tl.store(out_ptr + NUM_SCALARS + num_columns + k, values.to(tl.float64) - norm, mask=k < num_top)


@triton.jit(
    do_not_specialize=["max_stride", "values_stride", "ids_stride", "num_top"],
    do_not_specialize_on_alignment=["token_ids_ptr", "status_ptr", "max_ptr", "values_ptr", "ids_ptr"],
)
def _row_logprobs(
    x_ptr, token_ids_ptr, status_ptr, max_ptr, values_ptr, ids_ptr, out_ptr, row_stride, max_stride,
    values_stride, ids_stride, vocab, num_top, scale, LOG_SCALE: tl.constexpr, K: tl.constexpr,
    LINES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    store_logprobs(
        x_ptr + row * row_stride, tl.load(token_ids_ptr + row), tl.load(status_ptr + row),
        tl.load(max_ptr + row * max_stride), values_ptr + row * values_stride, ids_ptr + row * ids_stride,
        out_ptr + row * (NUM_SCALARS + 2 * num_top), vocab, num_top, num_top, scale, LOG_SCALE, K, LINES,
        WIDTH,
    )  # fmt: skip


def row_logprobs(
    x_LV: Tensor,
    token_ids_L: Tensor,
    status_L: Tensor,
    max_L: Tensor,
    leaders: tuple[Tensor, Tensor] | None,
    *,
    bits: int,
) -> Tensor:
    """Return float64 [L, 4 + 2K] in the layout of `PackedLogprobs`. Only enqueues.

    `x_LV` are float32 logits with adjacent elements, `max_L` the largest of each row, `leaders` the values
    [L, K] and ids [L, K] of the leading tokens.
    """
    rows, vocab = x_LV.shape
    values, ids = leaders if leaders is not None else (max_L[:, None], token_ids_L[:, None])
    num_top = values.shape[1] if leaders is not None else 0
    out = torch.empty(rows, 4 + 2 * num_top, dtype=torch.float64, device=x_LV.device)
    _row_logprobs[(rows,)](
        x_LV, token_ids_L, status_L, max_L, values, ids, out, x_LV.stride(0), max_L.stride(0),
        values.stride(0), ids.stride(0), vocab, num_top, 2.0**bits, LOG_SCALE=bits * math.log(2.0),
        K=triton.next_power_of_2(max(1, num_top)), LINES=LINES, WIDTH=WIDTH, num_warps=WARPS,
    )  # fmt: skip
    return out
