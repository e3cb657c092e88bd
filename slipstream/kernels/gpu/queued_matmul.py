# pyright: reportMissingImports=false, reportIndexIssue=false
"""How do tokens meet a matrix with the same bits, however many they are, at the speed of its bytes? One sum.

A program owns a tile of tokens and outputs and adds up all its inputs, from the first to the last, in
float32; no sum is cut. Blocks of both operands are fetched ahead by the tensor memory accelerator. A few
tokens meet narrow tiles with many bytes of weights on their way, many tokens large ones that one program
takes in turn, the loads of the next under the end of the last. A gated activation takes its gate and up rows
in one program.
Invariant: an element is a chain over the inputs, 16 at a time in one instruction of the matrix unit, and what
follows it is arithmetic of that element alone; so no size of a tile, queue or step changes a bit of it. An
end that no block divides adds exact zeros.
T tokens, I inputs, O outputs, F = O / 2 of a gated product.
"""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from slipstream.kernels.gpu.gated_activation import activate
from slipstream.kernels.gpu.launching import launch_options, sms_of, start_next, wait_for_previous
from slipstream.kernels.gpu.matmul import ask_for

NO_ACTIVATION = -1
# Elements of 16 bits in the 16 bytes that a line must begin at a multiple of.
ALIGNMENT = 8


@dataclasses.dataclass(frozen=True, slots=True)
class Tile:
    """How a product is cut, and how it runs. None of it changes a bit.

    `weights_first` says which operand takes the matrix unit's rows, in units of 64; `ahead` is how many
    blocks of weights are asked for before the wait. `group` tiles of tokens meet the same weights one after
    the other. With `in_turn`, as many programs as run at once take one tile after the other.
    """

    tokens: int
    outputs: int
    inputs: int
    stages: int
    warps: int
    weights_first: bool = False
    ahead: int = 0
    group: int = 16
    in_turn: bool = False


@triton.jit
def _place(tile, token_tiles, output_tiles, GROUP: tl.constexpr):
    """Return which tile of tokens and which of outputs it is: `GROUP` of tokens stay together in the L2."""
    size = GROUP * output_tiles
    first = tile // size * GROUP
    count = tl.minimum(token_tiles - first, GROUP)
    inside = tile % size
    return first + inside % count, inside // count


@triton.jit
def _sum(
    x_desc, w_desc, first_m, first_n, outputs,
    INPUTS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, WEIGHTS_FIRST: tl.constexpr,
    IS_GATED: tl.constexpr,
):  # fmt: skip
    """Return the sums of a tile, and those of its up rows: [BM, BN], or [BN, BM] with the weights first."""
    acc = tl.zeros((BN, BM) if WEIGHTS_FIRST else (BM, BN), tl.float32)
    up = acc
    for k in range(0, INPUTS, BK):
        x = x_desc.load([first_m, k])
        w = w_desc.load([first_n, k])
        acc = tl.dot(w, x.T, acc) if WEIGHTS_FIRST else tl.dot(x, w.T, acc)
        if IS_GATED:
            w_up = w_desc.load([outputs + first_n, k])
            up = tl.dot(w_up, x.T, up) if WEIGHTS_FIRST else tl.dot(x, w_up.T, up)
    return acc, up


@triton.jit
def _finish(
    acc, up, m, n, residual_ptr, y_ptr, tokens, outputs,
    WEIGHTS_FIRST: tl.constexpr, ACTIVATION: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
):  # fmt: skip
    """Do what stands behind the product of [tokens m, outputs n], round once and store."""
    if ACTIVATION >= 0:
        acc = activate(acc, ACTIVATION) * up
    if WEIGHTS_FIRST:
        acc = acc.T
    place = m.to(tl.int64)[:, None] * outputs + n[None, :]
    mask = (m < tokens)[:, None] & (n < outputs)[None, :]
    if HAS_RESIDUAL:
        acc += tl.load(residual_ptr + place, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + place, acc.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["tokens", "token_tiles", "tiles"])
def _queued(
    x_desc, w_desc, w_ptr, residual_ptr, y_ptr, tokens, outputs, token_tiles, tiles,
    INPUTS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    WEIGHTS_FIRST: tl.constexpr, AHEAD: tl.constexpr, ACTIVATION: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    IN_TURN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    start_next(PDL)
    IS_GATED: tl.constexpr = ACTIVATION >= 0
    first = tl.program_id(0)
    output_tiles = tl.cdiv(outputs, BN)
    if PDL and AHEAD > 0:
        _, first_tile = _place(first, token_tiles, output_tiles, GROUP)
        ask_for(w_ptr, first_tile * BN, 0, outputs, INPUTS, BN, AHEAD * BK)
        if IS_GATED:
            up_ptr = w_ptr + outputs.to(tl.int64) * INPUTS
            ask_for(up_ptr, first_tile * BN, 0, outputs, INPUTS, BN, AHEAD * BK)
    wait_for_previous(PDL)
    if IN_TURN:
        # Counted apart: the loop's own number belongs to the loads, which run ahead of what is stored.
        done = first
        for tile in tl.range(first, tiles, tl.num_programs(0), flatten=True):
            m_tile, n_tile = _place(tile, token_tiles, output_tiles, GROUP)
            acc, up = _sum(
                x_desc, w_desc, m_tile * BM, n_tile * BN, outputs, INPUTS, BM, BN, BK, WEIGHTS_FIRST, IS_GATED
            )  # fmt: skip
            m_tile, n_tile = _place(done, token_tiles, output_tiles, GROUP)
            done += tl.num_programs(0)
            _finish(
                acc, up, m_tile * BM + tl.arange(0, BM), n_tile * BN + tl.arange(0, BN), residual_ptr, y_ptr,
                tokens, outputs, WEIGHTS_FIRST, ACTIVATION, HAS_RESIDUAL,
            )  # fmt: skip
    else:
        m_tile, n_tile = _place(first, token_tiles, output_tiles, GROUP)
        acc, up = _sum(
            x_desc, w_desc, m_tile * BM, n_tile * BN, outputs, INPUTS, BM, BN, BK, WEIGHTS_FIRST, IS_GATED
        )  # fmt: skip
        _finish(
            acc, up, m_tile * BM + tl.arange(0, BM), n_tile * BN + tl.arange(0, BN), residual_ptr, y_ptr,
            tokens, outputs, WEIGHTS_FIRST, ACTIVATION, HAS_RESIDUAL,
        )  # fmt: skip


def is_aligned(x: Tensor) -> bool:
    """Say whether the tensor memory accelerator can fetch blocks of a matrix of 16-bit elements."""
    begins = x.data_ptr() % (2 * ALIGNMENT) == 0
    is_apart = x.stride(0) >= x.shape[1] and x.stride(0) % ALIGNMENT == 0
    return begins and x.stride(-1) == 1 and is_apart


def queued_matmul(
    x_TI: Tensor,
    weight_OI: Tensor,
    *,
    tile: Tile,
    activation: int = NO_ACTIVATION,
    residual_TO: Tensor | None = None,
) -> Tensor:
    """Return act(x @ W^T) + residual, [T, O] or [T, F], in x's type: 16 bits. Only enqueues.

    `weight_OI` and the residual are contiguous, the weight aligned (`is_aligned`); x is copied if it is not.
    """
    x_TI = x_TI if is_aligned(x_TI) else x_TI.clone(memory_format=torch.contiguous_format)
    tokens, inputs = x_TI.shape
    rows = weight_OI.shape[0]
    outputs = rows // 2 if activation != NO_ACTIVATION else rows
    y = torch.empty(tokens, outputs, dtype=x_TI.dtype, device=x_TI.device)
    if tokens == 0:
        return y
    token_tiles = triton.cdiv(tokens, tile.tokens)
    tiles = token_tiles * triton.cdiv(outputs, tile.outputs)
    x_desc = TensorDescriptor(x_TI, [tokens, inputs], [x_TI.stride(0), 1], [tile.tokens, tile.inputs])
    w_desc = TensorDescriptor(weight_OI, [rows, inputs], [inputs, 1], [tile.outputs, tile.inputs])
    _queued[(min(tiles, sms_of(x_TI)) if tile.in_turn else tiles,)](
        x_desc, w_desc, weight_OI, y if residual_TO is None else residual_TO, y, tokens, outputs, token_tiles,
        tiles, INPUTS=inputs, BM=tile.tokens, BN=tile.outputs, BK=tile.inputs, GROUP=tile.group,
        WEIGHTS_FIRST=tile.weights_first, AHEAD=tile.ahead, ACTIVATION=activation,
        HAS_RESIDUAL=residual_TO is not None, IN_TURN=tile.in_turn, num_warps=tile.warps,
        num_stages=tile.stages, **launch_options(x_TI),
    )  # fmt: skip
    return y
