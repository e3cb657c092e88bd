"""How do two products share the RMS norm between them? The definition, op by op.

`linear_then_norm` ends in a sum with the residual and in what the next product takes: either the normed sum,
or the sum times the norm's weight with the squares of each line, from which the scale of a norm follows. The
next product, `scaled_linear`, takes either: a line's scale 1 / sqrt(mean square + eps) commutes with it.
T tokens, I inputs, O outputs of W, L parts of a line's squares: none where the scale is applied already.
Invariant: together they are linear, add, RMS norm, linear; a kernel may round elsewhere, not more often.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import linear

from slipstream.kernels.fused_linear import GATED
from slipstream.kernels.registration import register_op
from slipstream.kernels.rms_norm import add_rms_norm, add_rms_norm_op

if TYPE_CHECKING:
    from slipstream.kernels.gpu.matmul import Tile

# Zeros for kernels that cut a product: one for each tile of outputs and tokens.
NUM_COUNTERS = 2048
# Lines that our products read begin at multiples of 16 bytes.
LINE_ELEMENTS = 8


def linear_then_norm(
    x_TI: Tensor,
    weight_OI: Tensor,
    bias_O: Tensor | None,
    residual_TO: Tensor,
    norm_O: Tensor,
    eps: float,
    counters: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y = W x + b + residual [T, O], what the next product takes [T, O], and its squares [L, T].

    `counters` are `NUM_COUNTERS` zeros, int32, that a kernel may count in and leaves at zero; the definition
    has no use for them. `norm_O` is float32.
    """
    normed, total = add_rms_norm(linear(x_TI, weight_OI, bias_O), residual_TO, norm_O, eps)
    return total, normed, torch.empty(0, len(x_TI), dtype=torch.float32, device=x_TI.device)


def scaled_linear(
    x_TI: Tensor,
    squares_LT: Tensor,
    eps: float,
    weight_OI: Tensor,
    bias_O: Tensor | None,
    activation: str,
    residual_TO: Tensor | None,
    counters: Tensor,
) -> Tensor:
    """Return act(scale * (W x) + b) + residual: [T, O], or [T, O / 2] of a gated activation (see `GATED`)."""
    if len(squares_LT):
        mean = squares_LT.sum(0) / x_TI.shape[1]
        x_TI = (x_TI.float() * torch.rsqrt(mean + eps)[:, None]).to(x_TI.dtype)
    y = linear(x_TI, weight_OI, bias_O)
    if activation:
        y = GATED[activation][1](y)
    return y if residual_TO is None else residual_TO + y


def _then_norm_cuda(
    x_TI: Tensor,
    weight_OI: Tensor,
    bias_O: Tensor | None,
    residual_TO: Tensor,
    norm_O: Tensor,
    eps: float,
    counters: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    tile = _tile_of(x_TI, weight_OI, "", counters)
    # Not in float16, where a sum that was never scaled down might not fit; and only what the next can take.
    can_follow = x_TI.dtype == torch.bfloat16 and weight_OI.shape[0] % LINE_ELEMENTS == 0
    if tile is None or not can_follow:
        normed, total = add_rms_norm_op(linear(x_TI, weight_OI, bias_O), residual_TO, norm_O, eps)
        return total, normed, torch.empty(0, len(x_TI), dtype=torch.float32, device=x_TI.device)
    from slipstream.kernels.gpu.matmul import matmul

    return matmul(
        x_TI,
        weight_OI,
        tile=tile,
        bias_O=bias_O,
        residual_TO=residual_TO.contiguous(),
        norm_O=norm_O,
        counters=counters,
    )


def _scaled_cuda(
    x_TI: Tensor,
    squares_LT: Tensor,
    eps: float,
    weight_OI: Tensor,
    bias_O: Tensor | None,
    activation: str,
    residual_TO: Tensor | None,
    counters: Tensor,
) -> Tensor:
    has_scale = len(squares_LT) > 0
    tile = _tile_of(x_TI, weight_OI, activation, counters, must_scale=has_scale)
    if tile is None:
        y = linear(x_TI, weight_OI, bias_O)
        if activation:
            from slipstream.kernels.gpu.gated_activation import gated_activation

            y = gated_activation(y, GATED[activation][0])
        return y if residual_TO is None else residual_TO + y
    from slipstream.kernels.gpu.matmul import NO_ACTIVATION, matmul

    return matmul(
        x_TI,
        weight_OI,
        tile=tile,
        bias_O=bias_O,
        residual_TO=None if residual_TO is None else residual_TO.contiguous(),
        activation=GATED[activation][0] if activation else NO_ACTIVATION,
        squares_LT=squares_LT if has_scale else None,
        eps=eps,
        counters=counters,
    )[0]


def _tile_of(
    x_TI: Tensor, weight_OI: Tensor, activation: str, counters: Tensor, *, must_scale: bool = False
) -> Tile | None:
    """Return how our kernel cuts the product, None where the vendor's library is to compute it."""
    from slipstream.kernels.gpu.matmul_tiles import tile_of

    return tile_of(
        x_TI, weight_OI, is_gated=bool(activation), has_counters=len(counters) > 0, must_serve=must_scale
    )


def _then_norm_fake(
    x_TI: Tensor,
    weight_OI: Tensor,
    bias_O: Tensor | None,
    residual_TO: Tensor,
    norm_O: Tensor,
    eps: float,
    counters: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    y = x_TI.new_empty((x_TI.shape[0], weight_OI.shape[0]))
    return y, torch.empty_like(y), x_TI.new_empty((0, x_TI.shape[0]), dtype=torch.float32)


def _scaled_fake(
    x_TI: Tensor,
    squares_LT: Tensor,
    eps: float,
    weight_OI: Tensor,
    bias_O: Tensor | None,
    activation: str,
    residual_TO: Tensor | None,
    counters: Tensor,
) -> Tensor:
    outputs = weight_OI.shape[0] // 2 if activation else weight_OI.shape[0]
    return x_TI.new_empty((x_TI.shape[0], outputs))


linear_then_norm_op = register_op(
    "linear_then_norm(Tensor x_TI, Tensor weight_OI, Tensor? bias_O, Tensor residual_TO, Tensor norm_O, "
    "float eps, Tensor(a!) counters) -> (Tensor, Tensor, Tensor)",
    linear_then_norm,
    _then_norm_fake,
    cuda=_then_norm_cuda,
)
scaled_linear_op = register_op(
    "scaled_linear(Tensor x_TI, Tensor squares_LT, float eps, Tensor weight_OI, Tensor? bias_O, "
    "str activation, Tensor? residual_TO, Tensor(a!) counters) -> Tensor",
    scaled_linear,
    _scaled_fake,
    cuda=_scaled_cuda,
)
