"""What do packed matrices and their products mean? In plain torch, for the kernels to be held against.

`unpack` reads the layout of `src/matrix.h`; `quantize_reference` is the form of activations of
`src/activations.h`, to the bit; `linear_reference` sums in float64, so that what is left is the kernel's own
rounding, which `error_bound` bounds from its number of operations.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from slipstream.kernels.cpu.packed_matrix import GROUP, TILE_ROWS, Kind, PackedMatrix

_QUAD_BYTES = 64
# Bytes of codes of one group of a tile, and half floats per row and group.
_CODE_QUADS = {
    **{Kind.Q4_SYM: 4, Kind.Q4_MIN: 4, Kind.Q5_SYM: 5, Kind.Q5_MIN: 5},
    **{Kind.Q6: 6, Kind.Q8_GROUP: 8, Kind.Q8_ROW: 8},
}
_HALVES = {Kind.Q4_SYM: 1, Kind.Q4_MIN: 2, Kind.Q5_SYM: 1, Kind.Q5_MIN: 2, Kind.Q6: 2, Kind.Q8_GROUP: 1}
_OFFSETS = {Kind.Q4_SYM: 8, Kind.Q5_SYM: 16, Kind.Q6: 32}
_MINIMUM_KINDS = (Kind.Q4_MIN, Kind.Q5_MIN)
_ROUNDING = 2.0**-24


class Codes(NamedTuple):
    """A quantised matrix: weight = scale * code + minimum. All float64, groups of 16 columns.

    `codes` [rows, groups, 16], `scales` and `minima` [rows, groups].
    """

    codes: Tensor
    scales: Tensor
    minima: Tensor


class QuantizedActivations(NamedTuple):
    """`codes` int8 [T, groups, 32] and `scales` float32 [T, groups] of the rows of a step."""

    codes: Tensor
    scales: Tensor


def unpack(matrix: PackedMatrix) -> Tensor:
    """Return the weights as float32 [rows, cols], from the packed bytes."""
    if matrix.kind.is_floating:
        return _unpack_floats(matrix)
    codes, scales, minima = codes_of(matrix)
    # scale x code is exact in float32 wherever the scale is a half float, so one rounding is left.
    product = scales.float()[:, :, None] * codes.float()
    weights = product + minima.float()[:, :, None]
    return weights.reshape(matrix.rows, -1)[:, : matrix.cols].contiguous()


def _unpack_floats(matrix: PackedMatrix) -> Tensor:
    dtype = torch.float32 if matrix.kind is Kind.F32 else torch.bfloat16
    columns = -(-matrix.cols // GROUP) * GROUP
    tiles = matrix.data.view(dtype).view(-1, columns, TILE_ROWS)
    return tiles.transpose(1, 2).reshape(-1, columns)[: matrix.rows, : matrix.cols].float()


def codes_of(matrix: PackedMatrix) -> Codes:
    """Return the integers and scales of a matrix that is not of a float kind."""
    groups = -(-matrix.cols // GROUP)
    tiles = matrix.data.view(-1, matrix.tile_bytes)
    code_bytes = groups * _CODE_QUADS[matrix.kind] * _QUAD_BYTES
    packed = tiles[:, :code_bytes].reshape(len(tiles), groups, -1, TILE_ROWS, 4).to(torch.int32)
    quads = _quads(matrix.kind, packed)
    # [tile, group, quad, row, 4] to [tile, row, group, quad, 4]
    codes = quads.permute(0, 3, 1, 2, 4).reshape(-1, 2 * groups, 16)
    scales, minima = _scales(matrix, tiles[:, code_bytes:], groups)
    rows = matrix.rows
    offset = _OFFSETS.get(matrix.kind, 0)
    return Codes((codes - offset)[:rows].double(), scales[:rows].double(), minima[:rows].double())


def _quads(kind: Kind, packed: Tensor) -> Tensor:
    """Return the stored code of every column, [tile, group, 8, row, 4]."""
    if kind in (Kind.Q8_GROUP, Kind.Q8_ROW):
        return packed.to(torch.int8).to(torch.int32)
    low, high = packed[:, :, :4], packed[:, :, 4:]
    quads = torch.stack((low & 15, low >> 4), dim=3).flatten(2, 3)
    index = torch.arange(8)[:, None, None]
    if _CODE_QUADS[kind] == 5:
        quads = quads | ((high >> index & 1) << 4)
    if kind is Kind.Q6:
        planes = high.repeat_interleave(4, dim=2)
        quads = quads | ((planes >> 2 * (index % 4) & 3) << 4)
    return quads


def _scales(matrix: PackedMatrix, raw: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Return scales and minima of every row and 16 columns."""
    if matrix.kind is Kind.Q8_ROW:
        scales = raw.contiguous().view(torch.float32)[:, :TILE_ROWS].reshape(-1, 1).expand(-1, 2 * groups)
        return scales, torch.zeros_like(scales)
    halves = _HALVES[matrix.kind]
    used = raw[:, : groups * halves * TILE_ROWS * 2].contiguous().view(torch.float16)
    table = used.view(-1, groups, halves, TILE_ROWS).permute(0, 3, 1, 2).reshape(-1, groups, halves).float()
    if matrix.kind is Kind.Q6:
        scales = table.flatten(1)
        return scales, torch.zeros_like(scales)
    scales = table[:, :, 0].repeat_interleave(2, dim=1)
    if matrix.kind in _MINIMUM_KINDS:
        return scales, table[:, :, 1].repeat_interleave(2, dim=1)
    return scales, torch.zeros_like(scales)


def quantize_reference(x: Tensor) -> QuantizedActivations:
    """Return the int8 form of `x` [T, cols] float32: largest magnitude / 127 per 32 columns, ties to even."""
    padded = torch.nn.functional.pad(x, (0, -x.shape[1] % GROUP)).view(x.shape[0], -1, GROUP)
    largest = padded.abs().amax(-1, keepdim=True)
    inverse = torch.where(largest < 1e-36, 0.0, 127.0 / largest)
    codes = torch.round(padded * inverse)
    scales = torch.where(largest < 1e-36, 0.0, largest * torch.tensor(1.0 / 127.0))
    is_finite = largest.isfinite()
    scales = torch.where(is_finite, scales, torch.nan)
    return QuantizedActivations(torch.where(is_finite, codes, 0.0).to(torch.int8), scales[:, :, 0])


def linear_reference(x: Tensor, matrix: PackedMatrix) -> Tensor:
    """Return x @ W^T of `x` [T, cols] as float64 [T, rows], with activations in the form the kernel uses."""
    if matrix.kind.is_floating:
        return x.double() @ unpack(matrix).double().T
    return _group_terms(x, matrix).sum((-1, -2))


def error_bound(x: Tensor, matrix: PackedMatrix) -> Tensor:
    """Return how far the kernel may be from `linear_reference`, [T, rows].

    Every rounding is at most 2^-24 of a partial sum, and no partial sum exceeds the sum of its terms'
    magnitudes. A group costs one fused operation for each scale and minimum; the product of two scales and
    that of a scale and a sum round once more, as does a row's scale. A float kind adds 32 products a group.
    """
    groups = -(-matrix.cols // GROUP)
    if matrix.kind.is_floating:
        magnitudes = x.double().abs() @ unpack(matrix).double().abs().T
        return (GROUP + groups) * _ROUNDING * magnitudes
    operations = groups * max(1, _HALVES.get(matrix.kind, 0)) + 3
    return operations * _ROUNDING * _group_terms(x, matrix).abs().sum((-1, -2))


def _group_terms(x: Tensor, matrix: PackedMatrix) -> Tensor:
    """Return what each 16 columns add, [T, rows, groups, 2]: scaled products, and minimum x sum."""
    codes, scales, minima = codes_of(matrix)
    activations = quantize_reference(x)
    tokens = x.shape[0]
    x_codes = activations.codes.double().view(tokens, -1, 16)
    x_scales = activations.scales.double().repeat_interleave(2, dim=1)
    products = torch.einsum("tgk,rgk->trg", x_codes, codes) * scales * x_scales[:, None]
    sums = (x_codes.sum(-1) * x_scales)[:, None] * minima
    return torch.stack((products, sums), dim=-1)
