# pyright: reportMissingImports=false, reportIndexIssue=false
"""What do rows with penalties, or whose logprobs are wanted, need of a step around the choice of a token?

Before it, `prepare_rows` notes the leading logits of rows that want logprobs and then changes those of the
tokens that rows with penalties have seen; after it, `finish_rows` takes the changes back, writes logprobs,
and counts the token. What a row asks for is read from the tables of the engine's rows.
Invariant: the bits of `leaders.py`, `penalties.py` and `row_logprobs.py` over a batch of such rows. Lines of
nobody and of rows that ask for neither are left as they are.
R lines, V vocabulary, B blocks of it, S slots of rows with penalties, W tokens that these may have seen, K
leaders at most. A row gets its token inside where its number stands in either line of `rows_2R`.
"""

from __future__ import annotations

import dataclasses
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from slipstream.kernels.gpu.launching import launch_options, start_next, wait_for_previous
from slipstream.kernels.gpu.leaders import BLOCK, BLOCKS, store_block_maxima, store_leaders
from slipstream.kernels.gpu.penalties import BLOCK as SEEN_BLOCK
from slipstream.kernels.gpu.penalties import penalise_row, restore_row
from slipstream.kernels.gpu.row_logprobs import LINES, NUM_SCALARS, WARPS, WIDTH, store_logprobs

# Where the tables of penalties stand may change between two replays of a captured step: their addresses, and
# their width, are numbers on the device.
COUNTS, SEEN, LENGTHS, SAVED, SEEN_WIDTH = (tl.constexpr(i) for i in range(5))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ExtraColumns:
    """Columns of the row tables: of the floats the three penalties, of the ints the slot and the number of
    leaders, -1 where there is no slot and where no logprobs are wanted."""

    repetition: int
    presence: int
    frequency: int
    slot: int
    num_top: int


@triton.jit
def _row_of(rows_ptr, line, num_lines):
    return tl.maximum(tl.load(rows_ptr + line), tl.load(rows_ptr + num_lines + line))


@triton.jit(
    do_not_specialize=["num_lines"],
    do_not_specialize_on_alignment=["rows_ptr"],
)
def _note_maxima(
    x_ptr, rows_ptr, ints_ptr, maxima_ptr, line_stride, ints_stride, num_lines, vocab, num_blocks,
    NUM_TOP: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    line, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    start_next(PDL)
    wait_for_previous(PDL)
    row = _row_of(rows_ptr, line, num_lines)
    if row < 0:
        return
    if tl.load(ints_ptr + row * ints_stride + NUM_TOP) < 0:
        return
    store_block_maxima(
        x_ptr + line * line_stride, maxima_ptr + line * num_blocks, part, vocab, num_blocks, BLOCKS, BLOCK
    )


@triton.jit(
    do_not_specialize=["num_lines"],
    do_not_specialize_on_alignment=["rows_ptr"],
)
def _lead_and_penalise(
    x_ptr, rows_ptr, floats_ptr, ints_ptr, places_ptr, maxima_ptr, values_ptr, ids_ptr, line_stride,
    floats_stride, ints_stride, num_lines, vocab, num_blocks, REPETITION: tl.constexpr,
    PRESENCE: tl.constexpr, FREQUENCY: tl.constexpr, SLOT: tl.constexpr, NUM_TOP: tl.constexpr,
    K: tl.constexpr, BLOCKS_CEIL: tl.constexpr, BLOCK: tl.constexpr, SEEN_BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    line = tl.program_id(0).to(tl.int64)
    start_next(PDL)
    wait_for_previous(PDL)
    row = _row_of(rows_ptr, line, num_lines)
    if row < 0:
        return
    x_ptr += line * line_stride
    ints_ptr += row * ints_stride
    floats_ptr += row * floats_stride
    num_top, slot = tl.load(ints_ptr + NUM_TOP).to(tl.int32), tl.load(ints_ptr + SLOT)
    if num_top >= 0:
        # The greatest in any case: masses are relative to it.
        store_leaders(
            x_ptr, maxima_ptr + line * num_blocks, values_ptr + line * K, ids_ptr + line * K, vocab,
            num_blocks, tl.maximum(num_top, 1), K, BLOCKS_CEIL, BLOCK,
        )  # fmt: skip
        # Every thread has read the logits before one of them is changed.
        tl.debug_barrier()
    if slot >= 0:
        width = tl.load(places_ptr + SEEN_WIDTH)
        seen_ptr = tl.load(places_ptr + SEEN).to(tl.pointer_type(tl.int64)) + slot * width
        counts_ptr = tl.load(places_ptr + COUNTS).to(tl.pointer_type(tl.int32)) + slot * vocab
        saved_ptr = tl.load(places_ptr + SAVED).to(tl.pointer_type(tl.float32)) + slot * width
        length = tl.load(tl.load(places_ptr + LENGTHS).to(tl.pointer_type(tl.int64)) + slot).to(tl.int32)
        penalise_row(
            x_ptr, seen_ptr, length, counts_ptr, saved_ptr,
            tl.load(floats_ptr + REPETITION).to(tl.float32), tl.load(floats_ptr + PRESENCE).to(tl.float32),
            tl.load(floats_ptr + FREQUENCY).to(tl.float32), SEEN_BLOCK,
        )  # fmt: skip


@triton.jit(
    do_not_specialize=["num_lines"],
    do_not_specialize_on_alignment=["rows_ptr", "drawn_ptr"],
)
def _finish(
    x_ptr, rows_ptr, ints_ptr, places_ptr, drawn_ptr, values_ptr, ids_ptr, out_ptr, line_stride, ints_stride,
    num_lines, vocab, num_columns, scale, SLOT: tl.constexpr, NUM_TOP: tl.constexpr,
    LOG_SCALE: tl.constexpr, K: tl.constexpr, LINES: tl.constexpr, WIDTH: tl.constexpr,
    SEEN_BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    line = tl.program_id(0).to(tl.int64)
    start_next(PDL)
    wait_for_previous(PDL)
    row = _row_of(rows_ptr, line, num_lines)
    if row < 0:
        return
    x_ptr += line * line_stride
    ints_ptr += row * ints_stride
    num_top, slot = tl.load(ints_ptr + NUM_TOP).to(tl.int32), tl.load(ints_ptr + SLOT)
    token, status = tl.load(drawn_ptr + line), tl.load(drawn_ptr + num_lines + line)
    if slot >= 0:
        width = tl.load(places_ptr + SEEN_WIDTH)
        seen_ptr = tl.load(places_ptr + SEEN).to(tl.pointer_type(tl.int64)) + slot * width
        lengths_ptr = tl.load(places_ptr + LENGTHS).to(tl.pointer_type(tl.int64)) + slot
        length = tl.load(lengths_ptr)
        if num_top >= 0:
            saved_ptr = tl.load(places_ptr + SAVED).to(tl.pointer_type(tl.float32)) + slot * width
            restore_row(x_ptr, seen_ptr, length.to(tl.int32), saved_ptr, SEEN_BLOCK)
        # Before the list grows every thread has read its length, and sees the logits that others restored.
        tl.debug_barrier()
        count_ptr = tl.load(places_ptr + COUNTS).to(tl.pointer_type(tl.int32)) + slot * vocab + token
        number = tl.load(count_ptr)
        tl.debug_barrier()
        tl.store(count_ptr, number + 1)
        tl.store(seen_ptr + length, token)
        tl.store(lengths_ptr, length + 1)
    if num_top >= 0:
        values_ptr += line * K
        store_logprobs(
            x_ptr, token, status, tl.load(values_ptr), values_ptr, ids_ptr + line * K,
            out_ptr + line * (NUM_SCALARS + 2 * num_columns), vocab, num_top, num_columns, scale, LOG_SCALE,
            K, LINES, WIDTH,
        )  # fmt: skip


@dataclasses.dataclass(slots=True)
class StepExtras:
    """What one step's rows need around the choice. `tables` are floats float64, ints int64, and the places
    int64 [5] of the tables of penalties: addresses of counts int32 [S, V], seen tokens int64 [S, W], their
    lengths int64 [S] and float32 [S, W] for what is changed, then W."""

    logits_RV: Tensor
    rows_2R: Tensor
    tables: tuple[Tensor, Tensor, Tensor]
    columns: ExtraColumns
    leaders: tuple[Tensor, Tensor]

    @classmethod
    def prepare_rows(
        cls,
        logits_RV: Tensor,
        rows_2R: Tensor,
        tables: tuple[Tensor, Tensor, Tensor],
        *,
        columns: ExtraColumns,
        max_top: int,
    ) -> StepExtras:
        """Note leaders, `max_top` at most, and penalise, in place. Only enqueues."""
        assert logits_RV.dtype == torch.float32 and logits_RV.stride(1) == 1 and rows_2R.is_contiguous()
        lines, vocab = logits_RV.shape
        floats, ints, _ = tables
        num_blocks, k = triton.cdiv(vocab, BLOCK), triton.next_power_of_2(max_top)
        device, options = logits_RV.device, launch_options(logits_RV)
        maxima = torch.empty(lines, num_blocks, dtype=torch.float32, device=device)
        values = torch.empty(lines, k, dtype=torch.float32, device=device)
        ids = torch.empty(lines, k, dtype=torch.int64, device=device)
        _note_maxima[(lines, triton.cdiv(num_blocks, BLOCKS))](
            logits_RV, rows_2R, ints, maxima, logits_RV.stride(0), ints.stride(0), lines, vocab, num_blocks,
            NUM_TOP=columns.num_top, BLOCKS=BLOCKS, BLOCK=BLOCK, num_warps=4, **options,
        )  # fmt: skip
        _lead_and_penalise[(lines,)](
            logits_RV, rows_2R, *tables, maxima, values, ids, logits_RV.stride(0), floats.stride(0),
            ints.stride(0), lines, vocab, num_blocks, REPETITION=columns.repetition,
            PRESENCE=columns.presence, FREQUENCY=columns.frequency, SLOT=columns.slot,
            NUM_TOP=columns.num_top, K=k, BLOCKS_CEIL=triton.next_power_of_2(num_blocks), BLOCK=BLOCK,
            SEEN_BLOCK=SEEN_BLOCK, num_warps=8, enable_fp_fusion=False, **options,
        )  # fmt: skip
        return cls(logits_RV, rows_2R, tables, columns, (values, ids))

    def finish_rows(self, drawn_2R: Tensor, out_RW: Tensor, *, bits: int) -> None:
        """Take changes back, write logprobs float64 [R, 4 + 2 * most leaders] as `PackedLogprobs` has them,
        and count the tokens of `drawn_2R` (ids, then statuses, int64). Only enqueues."""
        x, ints, columns = self.logits_RV, self.tables[1], self.columns
        lines, vocab = x.shape
        values, ids = self.leaders
        num_columns = (out_RW.shape[1] - 4) // 2
        _finish[(lines,)](
            x, self.rows_2R, ints, self.tables[2], drawn_2R, values, ids, out_RW, x.stride(0), ints.stride(0),
            lines, vocab, num_columns, 2.0**bits, SLOT=columns.slot, NUM_TOP=columns.num_top,
            LOG_SCALE=bits * math.log(2.0), K=values.shape[1], LINES=LINES, WIDTH=WIDTH,
            SEEN_BLOCK=SEEN_BLOCK, num_warps=WARPS, **launch_options(x),
        )  # fmt: skip
