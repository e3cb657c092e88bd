# pyright: reportMissingImports=false, reportIndexIssue=false
"""Which token leads each line of logits on a GPU, and how does it get into its row? Two kernels.

The first finds the maximum of each part of a line, the second that of the line, says whether the line was
sound, and appends the token to its row of the engine.
Invariant: as in `sampling/`: among equal logits the lowest id wins; a maximum of NaN or +Inf is the model's
failure and one of -Inf means that nothing is allowed; such a line gets token 0. A line whose row number is
below 0 is not read: it gets token and status 0, and nothing is appended.
R lines, V vocabulary, C parts of a line.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from slipstream.kernels.gpu.launching import launch_options, start_next, wait_for_previous

PART = 4096
OK, BAD_LOGITS, ALL_MASKED = 0, 1, 2


@triton.jit(
    do_not_specialize_on_alignment=["rows_ptr"],
)
def _lead_parts(
    logits_ptr, rows_ptr, best_ptr, at_ptr, line_stride, vocab, parts, BLOCK: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    line, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    v = part * BLOCK + tl.arange(0, BLOCK)
    start_next(PDL)
    wait_for_previous(PDL)
    if tl.load(rows_ptr + line) < 0:
        return
    x = tl.load(logits_ptr + line * line_stride + v, mask=v < vocab, other=float("-inf")).to(tl.float32)
    x = tl.where(x != x, float("inf"), x)
    best, at = tl.max(x, 0, return_indices=True, return_indices_tie_break_left=True)
    tl.store(best_ptr + line * parts + part, best)
    tl.store(at_ptr + line * parts + part, part * BLOCK + at)


@triton.jit(
    do_not_specialize=["num_lines"],
    do_not_specialize_on_alignment=["rows_ptr", "out_ptr"],
)
def _append(
    best_ptr, at_ptr, rows_ptr, tokens_ptr, lengths_ptr, out_ptr, parts, tokens_stride, num_lines, longest,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    line = tl.program_id(0)
    c = tl.arange(0, BLOCK)
    start_next(PDL)
    wait_for_previous(PDL)
    row = tl.load(rows_ptr + line)
    if row < 0:
        tl.store(out_ptr + line, tl.full((), 0, tl.int64))
        tl.store(out_ptr + num_lines + line, tl.full((), 0, tl.int64))
    else:
        x = tl.load(best_ptr + line * parts + c, mask=c < parts, other=float("-inf"))
        best, part = tl.max(x, 0, return_indices=True, return_indices_tie_break_left=True)
        token = tl.load(at_ptr + line * parts + part)
        status = tl.where(best == float("inf"), 1, tl.where(best == float("-inf"), 2, 0))
        token = tl.where(status == 0, token, 0)
        tl.store(out_ptr + line, token.to(tl.int64))
        tl.store(out_ptr + num_lines + line, status.to(tl.int64))
        length = tl.load(lengths_ptr + row)
        tl.store(tokens_ptr + row * tokens_stride + length, token.to(tl.int32), mask=length < longest)
        tl.store(lengths_ptr + row, length + 1)


def greedy_append(
    logits_RV: Tensor, rows_R: Tensor, tokens_RL: Tensor, lengths_R: Tensor, out_2R: Tensor
) -> None:
    """Write token ids and statuses to `out_2R` int64 and append the tokens to their rows. Only enqueues."""
    lines, vocab = logits_RV.shape
    parts = triton.cdiv(vocab, PART)
    best = torch.empty(lines, parts, dtype=torch.float32, device=logits_RV.device)
    at = torch.empty(lines, parts, dtype=torch.int32, device=logits_RV.device)
    options = launch_options(logits_RV)
    _lead_parts[(lines, parts)](
        logits_RV, rows_R, best, at, logits_RV.stride(0), vocab, parts, BLOCK=PART, num_warps=4, **options
    )
    _append[(lines,)](
        best, at, rows_R, tokens_RL, lengths_R, out_2R, parts, tokens_RL.stride(0), lines,
        tokens_RL.shape[1], BLOCK=triton.next_power_of_2(parts), num_warps=1, **options,
    )  # fmt: skip
