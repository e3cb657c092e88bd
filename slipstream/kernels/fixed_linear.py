"""How does a linear layer run so that a token's bits depend on the token alone? The definition.

y = act(W x) + residual, each output summed in one order whatever the number of tokens; activation and
residual may be absent. The definition takes the tokens one by one, in memory of one alignment, which no
library can tell apart; a kernel may round less often in between.
T tokens, I inputs, O outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from slipstream.kernels.fused_linear import GATED
from slipstream.kernels.registration import register_op


def fixed_linear(
    x_TI: Tensor, weight_OI: Tensor, activation: str = "", residual_TO: Tensor | None = None
) -> Tensor:
    """Return [T, O], or [T, O / 2] of a gated `activation` (a key of `GATED`, "" for none), in x's type."""
    out = torch.empty(x_TI.shape[0], weight_OI.shape[0], dtype=x_TI.dtype, device=x_TI.device)
    line_1I = torch.empty(1, x_TI.shape[1], dtype=x_TI.dtype, device=x_TI.device)
    for token in range(x_TI.shape[0]):
        line_1I.copy_(x_TI[token : token + 1])
        out[token] = linear(line_1I, weight_OI)[0]
    if activation:
        out = GATED[activation][1](out)
    return out if residual_TO is None else residual_TO + out


def _cuda(x_TI: Tensor, weight_OI: Tensor, activation: str = "", residual_TO: Tensor | None = None) -> Tensor:
    if x_TI.dtype == torch.float64:
        return fixed_linear(x_TI, weight_OI, activation, residual_TO)
    from slipstream.kernels.gpu.fixed_matmul import fixed_matmul
    from slipstream.kernels.gpu.gated_activation import gated_activation
    from slipstream.kernels.gpu.queued_matmul import NO_ACTIVATION, queued_matmul
    from slipstream.kernels.gpu.queued_tiles import can_queue, tile_of

    kind = GATED[activation][0] if activation else NO_ACTIVATION
    if can_queue(weight_OI):
        tile = tile_of(len(x_TI), weight_OI, is_gated=bool(activation))
        residual_TO = None if residual_TO is None else residual_TO.contiguous()
        return queued_matmul(x_TI, weight_OI, tile=tile, activation=kind, residual_TO=residual_TO)
    y = fixed_matmul(x_TI, weight_OI)
    y = gated_activation(y, kind) if activation else y
    return y if residual_TO is None else residual_TO + y


def _fake(x_TI: Tensor, weight_OI: Tensor, activation: str = "", residual_TO: Tensor | None = None) -> Tensor:
    outputs = weight_OI.shape[0] // 2 if activation else weight_OI.shape[0]
    return x_TI.new_empty((x_TI.shape[0], outputs))


fixed_linear_op = register_op(
    'fixed_linear(Tensor x_TI, Tensor weight_OI, str activation="", Tensor? residual_TO=None) -> Tensor',
    fixed_linear,
    _fake,
    cuda=_cuda,
)
