# pyright: reportMissingImports=false, reportIndexIssue=false
"""How do a few to a few hundred tokens meet a matrix on a GPU, together with what stands around the product?

Such a product is bound by reading weights, so many bytes must be on their way on every multiprocessor: deep
queues of blocks, fetched by the tensor memory accelerator. A program owns a tile of outputs and tokens, or,
where there are fewer tiles than multiprocessors, a share of one's inputs; shares are kept in float32, and
whoever ends last joins them in their order. The first weights are asked for while the kernel before this one
still runs.

An RMS norm between two products costs no kernel. The first writes, beside its sum with the residual, that sum
times the norm's weight, and the squares of its part of each line; the second scales its lines by
1 / sqrt(mean square + eps) at the end. A gated activation takes its gate and up rows in one program.
Invariant: float32 from the loads to the one rounding at the end, and a result does not depend on which
program comes last.
T tokens, I inputs, O outputs, F = O / 2 of a gated product, L the tiles along the outputs.
"""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from slipstream.kernels.gpu.gated_activation import activate
from slipstream.kernels.gpu.launching import launch_options, start_next, wait_for_previous

NO_ACTIVATION = -1
# Elements of a weight that one request for a line of the L2 brings.
LINE = 64


@dataclasses.dataclass(frozen=True, slots=True)
class Tile:
    """How a product is cut: the sizes of a block, into how many shares along the inputs, and how it runs.

    `weights_first` says which operand takes the matrix unit's rows, in units of 64; `ahead` is how many
    blocks of weights are asked for before the wait.
    """

    tokens: int
    outputs: int
    inputs: int
    stages: int
    warps: int
    shares: int = 1
    weights_first: bool = True
    ahead: int = 0


@triton.jit
def ask_for(w_ptr, first, at, outputs, INPUTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Ask for a block of weights without waiting for it: a line of the L2 for each element here."""
    rows = first + tl.arange(0, ROWS)
    columns = at + tl.arange(0, COLUMNS // 64) * 64
    inside = (rows < outputs)[:, None] & (columns < INPUTS)[None, :]
    place = w_ptr + tl.where(inside, rows[:, None].to(tl.int64) * INPUTS + columns[None, :], 0)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [place.to(tl.uint64, bitcast=True)],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def _joined(part_ptr, place, tile, SHARES: tl.constexpr, SIZE: tl.constexpr):
    """Add the shares of a tile in their order. Past the L1, which misses other programs' stores."""
    total = tl.zeros_like(place).to(tl.float32)
    for share in range(SHARES):
        first = (tile.to(tl.int64) * SHARES + share) * SIZE
        total += tl.load(part_ptr + first + place, cache_modifier=".cg")
    return total


@triton.jit
def _finish(
    acc, up, m, n, bias_ptr, residual_ptr, squares_ptr, norm_ptr, out_ptr, normed_ptr, squares_out_ptr,
    tokens, outputs, parts, eps, n_tile,
    INPUTS: tl.constexpr, PARTS: tl.constexpr, WEIGHTS_FIRST: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_NORM: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """Do what stands behind the product of [tokens m, outputs n], and store it."""
    if WEIGHTS_FIRST:
        acc, up = acc.T, up.T
    is_m, is_n = m < tokens, n < outputs
    if HAS_SCALE:
        p = tl.arange(0, PARTS)
        squares = tl.load(
            squares_ptr + p[:, None] * tokens + m[None, :],
            mask=(p < parts)[:, None] & is_m[None, :],
            other=0.0,
        )
        scale = tl.rsqrt(tl.sum(squares, 0) / INPUTS + eps)[:, None]
        acc *= scale
        if ACTIVATION >= 0:
            up *= scale
    if HAS_BIAS:
        acc += tl.load(bias_ptr + n, mask=is_n, other=0.0).to(tl.float32)[None, :]
        if ACTIVATION >= 0:
            up += tl.load(bias_ptr + outputs + n, mask=is_n, other=0.0).to(tl.float32)[None, :]
    if ACTIVATION >= 0:
        acc = activate(acc, ACTIVATION) * up
    place = m.to(tl.int64)[:, None] * outputs + n[None, :]
    mask = is_m[:, None] & is_n[None, :]
    if HAS_RESIDUAL:
        acc += tl.load(residual_ptr + place, mask=mask, other=0.0).to(tl.float32)
    rounded = acc.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + place, rounded, mask=mask)
    if HAS_NORM:
        y = tl.where(mask, rounded.to(tl.float32), 0.0)
        weight = tl.load(norm_ptr + n, mask=is_n, other=0.0)[None, :]
        tl.store(normed_ptr + place, (y * weight).to(normed_ptr.dtype.element_ty), mask=mask)
        tl.store(squares_out_ptr + n_tile * tokens + m, tl.sum(y * y, 1), mask=is_m)


@triton.jit(do_not_specialize=["tokens", "parts"])
def _matmul(
    x_desc, w_desc, w_ptr, bias_ptr, residual_ptr, squares_ptr, norm_ptr, out_ptr, normed_ptr,
    squares_out_ptr, part_ptr, counters_ptr, tokens, outputs, parts, eps,
    INPUTS: tl.constexpr, PARTS: tl.constexpr, SHARES: tl.constexpr, TOKEN_TILES: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, WEIGHTS_FIRST: tl.constexpr, AHEAD: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_NORM: tl.constexpr,
    ACTIVATION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    tile, share = tl.program_id(0), tl.program_id(1)
    start_next(PDL)
    BLOCKS: tl.constexpr = (INPUTS + BK - 1) // BK
    OWN: tl.constexpr = (BLOCKS + SHARES - 1) // SHARES
    first_k = share * OWN
    last_k = tl.minimum(BLOCKS, first_k + OWN)
    n_tile = tile // TOKEN_TILES
    first_m, first_n = tile % TOKEN_TILES * BM, n_tile * BN
    if PDL and AHEAD > 0:
        ask_for(w_ptr, first_n, first_k * BK, outputs, INPUTS, BN, AHEAD * BK)
        if ACTIVATION >= 0:
            up_ptr = w_ptr + outputs.to(tl.int64) * INPUTS
            ask_for(up_ptr, first_n, first_k * BK, outputs, INPUTS, BN, AHEAD * BK)
    wait_for_previous(PDL)
    if WEIGHTS_FIRST:
        acc = tl.zeros((BN, BM), tl.float32)
        place = tl.arange(0, BN)[:, None] * BM + tl.arange(0, BM)[None, :]
    else:
        acc = tl.zeros((BM, BN), tl.float32)
        place = tl.arange(0, BM)[:, None] * BN + tl.arange(0, BN)[None, :]
    up = acc
    for k in range(first_k, last_k):
        x = x_desc.load([first_m, k * BK])
        w = w_desc.load([first_n, k * BK])
        if WEIGHTS_FIRST:
            acc = tl.dot(w, x.T, acc)
        else:
            acc = tl.dot(x, w.T, acc)
        if ACTIVATION >= 0:
            w_up = w_desc.load([outputs + first_n, k * BK])
            if WEIGHTS_FIRST:
                up = tl.dot(w_up, x.T, up)
            else:
                up = tl.dot(x, w_up.T, up)
    is_mine = True
    if SHARES > 1:
        SIZE: tl.constexpr = BM * BN * (2 if ACTIVATION >= 0 else 1)
        own = part_ptr + (tile.to(tl.int64) * SHARES + share) * SIZE + place
        tl.store(own, acc)
        if ACTIVATION >= 0:
            tl.store(own + BM * BN, up)
        # All lanes have stored before one of them says so.
        tl.debug_barrier()
        is_mine = tl.atomic_add(counters_ptr + tile, 1, sem="acq_rel") == SHARES - 1
        if is_mine:
            acc = _joined(part_ptr, place, tile, SHARES, SIZE)
            if ACTIVATION >= 0:
                up = _joined(part_ptr + BM * BN, place, tile, SHARES, SIZE)
            tl.store(counters_ptr + tile, 0)
    if is_mine:
        _finish(
            acc, up, first_m + tl.arange(0, BM), first_n + tl.arange(0, BN), bias_ptr, residual_ptr,
            squares_ptr, norm_ptr, out_ptr, normed_ptr, squares_out_ptr, tokens, outputs, parts, eps, n_tile,
            INPUTS, PARTS, WEIGHTS_FIRST, HAS_BIAS, HAS_RESIDUAL, HAS_SCALE, HAS_NORM, ACTIVATION,
        )  # fmt: skip


def matmul(
    x_TI: Tensor,
    weight_OI: Tensor,
    *,
    tile: Tile,
    bias_O: Tensor | None = None,
    residual_TO: Tensor | None = None,
    activation: int = NO_ACTIVATION,
    squares_LT: Tensor | None = None,
    eps: float = 0.0,
    norm_O: Tensor | None = None,
    counters: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y [T, O] (or [T, F]) and, with `norm_O`, y * norm and the squares of y by tile [L, T].

    y = act(scale * (W x) + b) + residual, where the scale of a line comes from `squares_LT` of its x.
    `counters` are zeros, int32, one for each tile, and are left at zero. Only enqueues.
    """
    tokens, inputs = x_TI.shape
    is_gated = activation != NO_ACTIVATION
    outputs = weight_OI.shape[0] // 2 if is_gated else weight_OI.shape[0]
    blocks = triton.cdiv(inputs, tile.inputs)
    # A share more than there are blocks for would have none.
    shares = triton.cdiv(blocks, triton.cdiv(blocks, tile.shares))
    token_tiles, output_tiles = triton.cdiv(tokens, tile.tokens), triton.cdiv(outputs, tile.outputs)
    num_tiles = token_tiles * output_tiles
    out = torch.empty(tokens, outputs, dtype=out_dtype or x_TI.dtype, device=x_TI.device)
    normed = squares_out = part = out
    if norm_O is not None:
        normed = torch.empty_like(out)
        squares_out = torch.empty(output_tiles, tokens, dtype=torch.float32, device=x_TI.device)
    if shares > 1:
        assert counters is not None and num_tiles <= len(counters), "a counter for each tile"
        size = num_tiles * shares * tile.tokens * tile.outputs * (2 if is_gated else 1)
        part = torch.empty(size, dtype=torch.float32, device=x_TI.device)
    parts = 1 if squares_LT is None else len(squares_LT)
    x_desc = TensorDescriptor(x_TI, [tokens, inputs], [x_TI.stride(0), 1], [tile.tokens, tile.inputs])
    rows = weight_OI.shape[0]
    w_desc = TensorDescriptor(
        weight_OI, [rows, inputs], [weight_OI.stride(0), 1], [tile.outputs, tile.inputs]
    )
    _matmul[(num_tiles, shares)](
        x_desc, w_desc, weight_OI,
        *(out if extra is None else extra for extra in (bias_O, residual_TO, squares_LT, norm_O)),
        out, normed, squares_out, part, out if counters is None else counters, tokens, outputs, parts, eps,
        INPUTS=inputs, PARTS=triton.next_power_of_2(parts), SHARES=shares, TOKEN_TILES=token_tiles,
        BM=tile.tokens, BN=tile.outputs, BK=tile.inputs, WEIGHTS_FIRST=tile.weights_first, AHEAD=tile.ahead,
        HAS_BIAS=bias_O is not None, HAS_RESIDUAL=residual_TO is not None, HAS_SCALE=squares_LT is not None,
        HAS_NORM=norm_O is not None, ACTIVATION=activation, num_warps=tile.warps, num_stages=tile.stages,
        **launch_options(x_TI),
    )  # fmt: skip
    return out, normed, squares_out
