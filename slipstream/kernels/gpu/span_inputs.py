# pyright: reportMissingImports=false, reportIndexIssue=false
"""How does a GPU look up what the longer spans of a step read? A program per tokens' block, and per span.

T tokens, B lines of the plan, R one-token rows in its first lines, P longer spans in the others, G cache
groups, C blocks of a row. Invariant: as of the definition in `kernels/span_inputs.py`: padding reads nothing,
and only the part of a block table that a span reaches is copied.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from slipstream.kernels.gpu.launching import launch_options, start_next, wait_for_previous

BLOCK = 128


@triton.jit(
    do_not_specialize=[
        "num_rows", "num_tokens", "token_programs", "plan_stride", "slots_stride", "table_stride_g",
        "table_stride_r",
    ],
    do_not_specialize_on_alignment=[
        "plan_ptr", "start_ptr", "line_ptr", "token_ptr", "position_ptr", "lens_ptr", "slots_ptr",
        "table_ptr",
    ],
)  # fmt: skip
def _look_up(
    plan_ptr, start_ptr, line_ptr, tokens_ptr, tables_ptr, token_ptr, position_ptr, lens_ptr, slots_ptr,
    table_ptr, num_rows, num_tokens, token_programs, plan_stride, slots_stride, tokens_stride,
    tables_stride_g, tables_stride_r, table_stride_g, table_stride_r,
    GROUPS: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0)
    c = tl.arange(0, BLOCK)
    start_next(PDL)
    wait_for_previous(PDL)
    if i < token_programs:
        t = i * BLOCK + c
        is_there = t < num_tokens
        line = tl.load(line_ptr + t, mask=is_there, other=-1)
        is_real = line >= 0
        row = tl.load(plan_ptr + line, mask=is_real, other=0)
        start = tl.load(plan_ptr + plan_stride + line, mask=is_real, other=0)
        first = tl.load(start_ptr + line, mask=is_real, other=0)
        position = tl.where(is_real, start + num_rows + t - first, 0)
        token = tl.load(tokens_ptr + row * tokens_stride + position, mask=is_real, other=0)
        tl.store(token_ptr + t, token.to(tl.int64), mask=is_there)
        tl.store(position_ptr + t, position, mask=is_there)
        for g in tl.static_range(GROUPS):
            entry = tables_ptr + g * tables_stride_g + row * tables_stride_r + position // PAGE
            page = tl.load(entry, mask=is_real, other=0).to(tl.int64)
            slot = tl.where(is_real, page * PAGE + position % PAGE, -1)
            tl.store(slots_ptr + g * slots_stride + t, slot, mask=is_there)
    else:
        span = i - token_programs
        line_of_span = num_rows + span
        row_of_span = tl.load(plan_ptr + line_of_span)
        if row_of_span < 0:
            tl.store(lens_ptr + span, tl.full((), 0, tl.int64))
        else:
            count = tl.load(start_ptr + line_of_span + 1) - tl.load(start_ptr + line_of_span)
            length = tl.load(plan_ptr + plan_stride + line_of_span) + count
            tl.store(lens_ptr + span, length)
            blocks = ((length + PAGE - 1) // PAGE).to(tl.int32)
            for g in tl.static_range(GROUPS):
                source = tables_ptr + g * tables_stride_g + row_of_span * tables_stride_r
                target = table_ptr + g * table_stride_g + span.to(tl.int64) * table_stride_r
                for at in range(0, blocks, BLOCK):
                    pages = tl.load(source + at + c, mask=at + c < blocks, other=0)
                    tl.store(target + at + c, pages, mask=at + c < blocks)


def span_inputs(
    plan_2B: Tensor,
    query_start: Tensor,
    line_T: Tensor,
    tokens_RL: Tensor,
    tables_GRC: Tensor,
    page_tokens: int,
    token_ids_T: Tensor,
    positions_T: Tensor,
    seq_lens_P: Tensor,
    slots_GT: Tensor,
    table_GPC: Tensor,
) -> None:
    """Fill the last five tensors; see `kernels/span_inputs.py`. Only enqueues."""
    groups, tokens = slots_GT.shape
    spans = len(seq_lens_P)
    programs = triton.cdiv(tokens, BLOCK)
    _look_up[(programs + spans,)](
        plan_2B, query_start, line_T, tokens_RL, tables_GRC, token_ids_T, positions_T, seq_lens_P, slots_GT,
        table_GPC, plan_2B.shape[1] - spans, tokens, programs, plan_2B.stride(0), slots_GT.stride(0),
        tokens_RL.stride(0), tables_GRC.stride(0), tables_GRC.stride(1), table_GPC.stride(0),
        table_GPC.stride(1), GROUPS=groups, PAGE=page_tokens, BLOCK=BLOCK, num_warps=1,
        **launch_options(plan_2B),
    )  # fmt: skip
