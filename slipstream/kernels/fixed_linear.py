"""How does a linear layer run so that a token's bits depend on the token alone? The definition.

y = W x, each output summed in one order whatever the number of tokens. The definition takes the tokens one by
one, in memory of one alignment, which no library can tell apart.
T tokens, I inputs, O outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from slipstream.kernels.registration import register_op


def fixed_linear(x_TI: Tensor, weight_OI: Tensor) -> Tensor:
    """Return [T, O] in x's type."""
    out = torch.empty(x_TI.shape[0], weight_OI.shape[0], dtype=x_TI.dtype, device=x_TI.device)
    line_1I = torch.empty(1, x_TI.shape[1], dtype=x_TI.dtype, device=x_TI.device)
    for token in range(x_TI.shape[0]):
        line_1I.copy_(x_TI[token : token + 1])
        out[token] = linear(line_1I, weight_OI)[0]
    return out


def _cuda(x_TI: Tensor, weight_OI: Tensor) -> Tensor:
    if x_TI.dtype == torch.float64:
        return fixed_linear(x_TI, weight_OI)
    from slipstream.kernels.gpu.fixed_matmul import fixed_matmul

    return fixed_matmul(x_TI, weight_OI)


def _fake(x_TI: Tensor, weight_OI: Tensor) -> Tensor:
    return x_TI.new_empty((x_TI.shape[0], weight_OI.shape[0]))


fixed_linear_op = register_op(
    "fixed_linear(Tensor x_TI, Tensor weight_OI) -> Tensor", fixed_linear, _fake, cuda=_cuda
)
