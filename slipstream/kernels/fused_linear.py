"""How does a linear layer run together with what stands before and after it? The definition, op by op.

y = act(W norm(x) + b) + residual, where each of norm, bias, activation and residual may be absent; a gated
activation takes the first half of the outputs as the gate of the second.
T tokens, I inputs, O outputs of W. Invariant: this is the composition of the ops it names; a fused kernel may
round less often in between, never more.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import linear

from slipstream.kernels.gelu_and_mul import gelu_and_mul, gelu_tanh_and_mul
from slipstream.kernels.registration import register_op
from slipstream.kernels.rms_norm import rms_norm
from slipstream.kernels.silu_and_mul import silu_and_mul

# By the names of Hugging Face's configurations; the number is what the kernels call it.
GATED = {
    "silu": (0, silu_and_mul),
    "swish": (0, silu_and_mul),
    "gelu": (1, gelu_and_mul),
    "gelu_pytorch_tanh": (2, gelu_tanh_and_mul),
}


def fused_linear(
    x_TI: Tensor,
    weight_OI: Tensor,
    norm_I: Tensor | None,
    eps: float,
    bias_O: Tensor | None,
    activation: str,
    residual_TO: Tensor | None,
) -> Tensor:
    """Return [T, O], or [T, O / 2] of a gated `activation` (a key of `GATED`, "" for none), in x's type."""
    if norm_I is not None:
        x_TI = rms_norm(x_TI, norm_I, eps)
    y = linear(x_TI, weight_OI, bias_O)
    if activation:
        y = GATED[activation][1](y)
    return y if residual_TO is None else residual_TO + y


def _cuda(
    x_TI: Tensor,
    weight_OI: Tensor,
    norm_I: Tensor | None,
    eps: float,
    bias_O: Tensor | None,
    activation: str,
    residual_TO: Tensor | None,
) -> Tensor:
    if len(x_TI) != 1:
        return _several(x_TI, weight_OI, norm_I, eps, bias_O, activation, residual_TO)
    from slipstream.kernels.gpu.gemv import NO_ACTIVATION, gemv
    from slipstream.kernels.gpu.gemv_tiles import tile_of

    kind = GATED[activation][0] if activation else NO_ACTIVATION
    tile = tile_of(weight_OI, is_gated=bool(activation))
    return gemv(
        x_TI,
        weight_OI,
        norm_I=norm_I,
        eps=eps,
        bias_O=bias_O,
        residual_1O=residual_TO,
        activation=kind,
        tile=tile,
    )


def _several(
    x_TI: Tensor,
    weight_OI: Tensor,
    norm_I: Tensor | None,
    eps: float,
    bias_O: Tensor | None,
    activation: str,
    residual_TO: Tensor | None,
) -> Tensor:
    from slipstream.kernels.gpu.matmul import NO_ACTIVATION, matmul
    from slipstream.kernels.gpu.matmul_tiles import tile_of

    tile = tile_of(x_TI, weight_OI, is_gated=bool(activation))
    if tile is None or norm_I is not None or not (residual_TO is None or residual_TO.is_contiguous()):
        return fused_linear(x_TI, weight_OI, norm_I, eps, bias_O, activation, residual_TO)
    kind = GATED[activation][0] if activation else NO_ACTIVATION
    return matmul(x_TI, weight_OI, tile=tile, bias_O=bias_O, residual_TO=residual_TO, activation=kind)[0]


def _fake(
    x_TI: Tensor,
    weight_OI: Tensor,
    norm_I: Tensor | None,
    eps: float,
    bias_O: Tensor | None,
    activation: str,
    residual_TO: Tensor | None,
) -> Tensor:
    outputs = weight_OI.shape[0] // 2 if activation else weight_OI.shape[0]
    return x_TI.new_empty((x_TI.shape[0], outputs))


fused_linear_op = register_op(
    "fused_linear(Tensor x_TI, Tensor weight_OI, Tensor? norm_I, float eps, Tensor? bias_O, str activation, "
    "Tensor? residual_TO) -> Tensor",
    fused_linear,
    _fake,
    cuda=_cuda,
)
