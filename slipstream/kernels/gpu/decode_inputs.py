# pyright: reportMissingImports=false, reportIndexIssue=false
"""How does a GPU look up what a step of one-token rows reads? One program per row.

R rows of the step, G cache groups, C blocks of a row. Invariant: a row number below 0 is padding: it gets
length 0, slots of -1, and token and position 0. Only the part of a block table that a row has reached is
copied.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from slipstream.kernels.gpu.launching import launch_options, start_next, wait_for_previous

BLOCK = 128


@triton.jit(
    do_not_specialize=["plan_stride", "slots_stride", "table_stride_g"],
    do_not_specialize_on_alignment=[
        "plan_ptr",
        "token_ptr",
        "position_ptr",
        "lens_ptr",
        "slots_ptr",
        "table_ptr",
    ],
)
def _look_up(
    plan_ptr, tokens_ptr, lengths_ptr, tables_ptr, token_ptr, position_ptr, lens_ptr, slots_ptr, table_ptr,
    plan_stride, slots_stride, tokens_stride, tables_stride_g, tables_stride_r,
    table_stride_g, table_stride_r,
    GROUPS: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0)
    start_next(PDL)
    wait_for_previous(PDL)
    row = tl.load(plan_ptr + i)
    if row < 0:
        tl.store(token_ptr + i, tl.full((), 0, tl.int64))
        tl.store(position_ptr + i, tl.full((), 0, tl.int64))
        tl.store(lens_ptr + i, tl.full((), 0, tl.int64))
        for g in tl.static_range(GROUPS):
            tl.store(slots_ptr + g * slots_stride + i, tl.full((), -1, tl.int64))
    else:
        # The host's start is an upper bound; the device's length decides.
        position = tl.minimum(tl.load(plan_ptr + plan_stride + i), tl.load(lengths_ptr + row) - 1)
        tl.store(token_ptr + i, tl.load(tokens_ptr + row * tokens_stride + position).to(tl.int64))
        tl.store(position_ptr + i, position)
        tl.store(lens_ptr + i, position + 1)
        c = tl.arange(0, BLOCK)
        blocks = (position // PAGE + 1).to(tl.int32)
        for g in tl.static_range(GROUPS):
            source = tables_ptr + g * tables_stride_g + row * tables_stride_r
            target = table_ptr + g * table_stride_g + i.to(tl.int64) * table_stride_r
            page = tl.load(source + position // PAGE).to(tl.int64)
            tl.store(slots_ptr + g * slots_stride + i, page * PAGE + position % PAGE)
            for at in range(0, blocks, BLOCK):
                pages = tl.load(source + at + c, mask=at + c < blocks, other=0)
                tl.store(target + at + c, pages, mask=at + c < blocks)


def decode_inputs(
    plan_2R: Tensor,
    tokens_RL: Tensor,
    lengths_R: Tensor,
    tables_GRC: Tensor,
    page_tokens: int,
    token_ids_R: Tensor,
    positions_R: Tensor,
    seq_lens_R: Tensor,
    slots_GR: Tensor,
    table_GRC: Tensor,
) -> None:
    """Fill the last five tensors; see `kernels/decode_inputs.py`. Only enqueues."""
    groups, rows = slots_GR.shape
    _look_up[(rows,)](
        plan_2R, tokens_RL, lengths_R, tables_GRC, token_ids_R, positions_R, seq_lens_R, slots_GR, table_GRC,
        plan_2R.stride(0), slots_GR.stride(0), tokens_RL.stride(0), tables_GRC.stride(0),
        tables_GRC.stride(1), table_GRC.stride(0), table_GRC.stride(1), GROUPS=groups, PAGE=page_tokens,
        BLOCK=BLOCK, num_warps=1, **launch_options(plan_2R),
    )  # fmt: skip
