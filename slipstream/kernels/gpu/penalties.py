# pyright: reportMissingImports=false, reportIndexIssue=false
"""How do penalties change logits, and how is a drawn token counted, in one kernel each?

The definition is `sampling/penalties.py`, and results are the same bits: no product is fused with a sum.
Invariant: a seen list may name a token twice, so a program reads all logits of its row before it writes one.
What it read stays in `saved`, from which `restore` brings the logits back. P rows, V vocabulary, W entries.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 512


@triton.jit
def penalise_row(
    x_ptr, seen_ptr, length, counts_ptr, saved_ptr, repetition, presence, frequency, BLOCK: tl.constexpr
):
    """Change the logits of the tokens that a row has seen, and save what was there."""
    w = tl.arange(0, BLOCK)
    for at in range(0, length, BLOCK):
        token = tl.load(seen_ptr + at + w, mask=at + w < length, other=0)
        x = tl.load(x_ptr + token, mask=at + w < length, other=0.0)
        tl.store(saved_ptr + at + w, x, mask=at + w < length)
    tl.debug_barrier()
    for at in range(0, length, BLOCK):
        token = tl.load(seen_ptr + at + w, mask=at + w < length, other=0)
        x = tl.load(saved_ptr + at + w, mask=at + w < length, other=0.0)
        count = tl.load(counts_ptr + token, mask=at + w < length, other=0)
        x = tl.where(x > 0, tl.div_rn(x, repetition), x * repetition)
        x -= count.to(tl.float32) * frequency
        x -= tl.where(count > 0, presence, 0.0)
        tl.store(x_ptr + token, x, mask=at + w < length)


@triton.jit
def restore_row(x_ptr, seen_ptr, length, saved_ptr, BLOCK: tl.constexpr):
    """Bring back what `penalise_row` saved."""
    w = tl.arange(0, BLOCK)
    for at in range(0, length, BLOCK):
        token = tl.load(seen_ptr + at + w, mask=at + w < length, other=0)
        x = tl.load(saved_ptr + at + w, mask=at + w < length, other=0.0)
        tl.store(x_ptr + token, x, mask=at + w < length)


# Numbers that change from batch to batch are not specialised on: a kernel would be compiled anew for some.
@triton.jit(
    do_not_specialize=["slots_stride", "repetition_stride", "presence_stride", "frequency_stride", "longest"],
    do_not_specialize_on_alignment=[
        "index_ptr",
        "slots_ptr",
        "repetition_ptr",
        "presence_ptr",
        "frequency_ptr",
    ],
)
def _penalise(
    x_ptr, index_ptr, slots_ptr, seen_ptr, length_ptr, counts_ptr, saved_ptr, repetition_ptr, presence_ptr,
    frequency_ptr, slots_stride, repetition_stride, presence_stride, frequency_stride, vocab, width, longest,
    BLOCK: tl.constexpr,
):  # fmt: skip
    p = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + p * slots_stride)
    penalise_row(
        x_ptr + tl.load(index_ptr + p) * vocab, seen_ptr + slot * width,
        tl.load(length_ptr + slot).to(tl.int32), counts_ptr + slot * vocab, saved_ptr + p * longest,
        tl.load(repetition_ptr + p * repetition_stride), tl.load(presence_ptr + p * presence_stride),
        tl.load(frequency_ptr + p * frequency_stride), BLOCK,
    )  # fmt: skip


@triton.jit(
    do_not_specialize=["slots_stride", "longest"],
    do_not_specialize_on_alignment=["index_ptr", "slots_ptr"],
)
def _restore(
    x_ptr, index_ptr, slots_ptr, seen_ptr, length_ptr, saved_ptr, slots_stride, vocab, width, longest,
    BLOCK: tl.constexpr,
):  # fmt: skip
    p = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + p * slots_stride)
    length = tl.load(length_ptr + slot).to(tl.int32)
    x_ptr += tl.load(index_ptr + p) * vocab
    restore_row(x_ptr, seen_ptr + slot * width, length, saved_ptr + p * longest, BLOCK)


@triton.jit(
    do_not_specialize=["slots_stride", "num_rows"],
    do_not_specialize_on_alignment=["token_ids_ptr", "index_ptr", "slots_ptr"],
)
def _count(
    token_ids_ptr, index_ptr, slots_ptr, seen_ptr, length_ptr, counts_ptr, slots_stride, vocab, width,
    num_rows, BLOCK: tl.constexpr,
):  # fmt: skip
    p = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_row = p < num_rows
    slot = tl.load(slots_ptr + p * slots_stride, mask=is_row, other=0)
    token = tl.load(token_ids_ptr + tl.load(index_ptr + p, mask=is_row, other=0), mask=is_row, other=0)
    place = counts_ptr + slot * vocab + token
    tl.store(place, tl.load(place, mask=is_row, other=0) + 1, mask=is_row)
    length = tl.load(length_ptr + slot, mask=is_row, other=0)
    tl.store(seen_ptr + slot * width + length, token, mask=is_row)
    tl.store(length_ptr + slot, length + 1, mask=is_row)


def penalise(
    logits_RV: Tensor,
    index_P: Tensor,
    slots_P: Tensor,
    tables: tuple[Tensor, Tensor, Tensor],
    penalties: tuple[Tensor, Tensor, Tensor],
    *,
    longest: int,
) -> Tensor:
    """Change rows of contiguous logits in place and return what was there, float32 [P, longest].

    `tables` are counts [S, V] int32, seen tokens [S, W] and lengths [S] int64, none above `longest`;
    `penalties` are repetition, presence and frequency, float32 [P]. Only enqueues.
    """
    counts, seen, lengths = tables
    repetition, presence, frequency = penalties
    saved = torch.empty(len(index_P), longest, dtype=torch.float32, device=logits_RV.device)
    _penalise[(len(index_P),)](
        logits_RV, index_P, slots_P, seen, lengths, counts, saved, repetition, presence, frequency,
        slots_P.stride(0), repetition.stride(0), presence.stride(0), frequency.stride(0),
        logits_RV.shape[1], seen.shape[1], longest, BLOCK=BLOCK, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return saved


def restore(
    logits_RV: Tensor, index_P: Tensor, slots_P: Tensor, seen: Tensor, lengths: Tensor, saved_PW: Tensor
) -> None:
    """Bring back what `penalise` changed, before `count` lengthens a list."""
    _restore[(len(index_P),)](
        logits_RV, index_P, slots_P, seen, lengths, saved_PW, slots_P.stride(0), logits_RV.shape[1],
        seen.shape[1], saved_PW.shape[1], BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip


def count(
    token_ids_R: Tensor, index_P: Tensor, slots_P: Tensor, tables: tuple[Tensor, Tensor, Tensor]
) -> None:
    """Count the tokens of rows `index_P` in their distinct slots and add them to the lists."""
    counts, seen, lengths = tables
    _count[(triton.cdiv(len(index_P), 128),)](
        token_ids_R, index_P, slots_P, seen, lengths, counts, slots_P.stride(0), counts.shape[1],
        seen.shape[1], len(index_P), BLOCK=128, num_warps=4,
    )  # fmt: skip
