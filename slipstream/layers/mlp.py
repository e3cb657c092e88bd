"""What happens to a token between attentions? A gated MLP, down(activation(gate(x)) * up(x)), or a plain one.

Invariant: the activation is named as in Hugging Face's configurations; an unknown name raises.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

from torch import Tensor, nn
from torch.nn.functional import gelu, relu, silu

from slipstream.core.errors import ConfigError, nearest
from slipstream.kernels.gelu_and_mul import gelu_and_mul, gelu_and_mul_op, gelu_tanh_and_mul
from slipstream.kernels.plugins import KERNELS
from slipstream.kernels.silu_and_mul import silu_and_mul, silu_and_mul_op
from slipstream.layers.build_context import BuildContext
from slipstream.layers.linear import ColumnParallelLinear, GateUpLinear, RowParallelLinear

# Hugging Face's names of activations; each takes gate and up side by side.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": silu_and_mul,
    "swish": silu_and_mul,
    "gelu": gelu_and_mul,
    "gelu_pytorch_tanh": gelu_tanh_and_mul,
}
# The same as registered ops, which have kernels of their own on a GPU and cost a CPU 5 us a call: there they
# are called where a plugin computes them.
ACTIVATION_OPS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": silu_and_mul_op,
    "swish": silu_and_mul_op,
    "gelu": gelu_and_mul_op,
    "gelu_pytorch_tanh": functools.partial(gelu_and_mul_op, approximate="tanh"),
}

OPS_OF = {
    "silu": "silu_and_mul",
    "swish": "silu_and_mul",
    "gelu": "gelu_and_mul",
    "gelu_pytorch_tanh": "gelu_and_mul",
}

gelu_tanh = functools.partial(gelu, approximate="tanh")
# For an MLP without a gate.
PLAIN_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": gelu,
    "gelu_new": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "relu": relu,
    "silu": silu,
}


class GatedMLP(nn.Module):
    """Gate and up in one GEMM, activation, down. Raises ConfigError for an activation it does not know."""

    def __init__(
        self,
        build: BuildContext,
        hidden_size: int,
        intermediate_size: int,
        *,
        activation: str = "silu",
        bias: bool = False,
    ) -> None:
        super().__init__()
        _check_known(activation, ACTIVATIONS)
        self.activation, self.activation_name = ACTIVATIONS[activation], activation
        self.gate_up = GateUpLinear(build, hidden_size, intermediate_size, bias=bias)
        self.down = RowParallelLinear(build, intermediate_size, hidden_size, bias=bias)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.down(self.gated(x_TD))

    def add(self, x_TD: Tensor, residual_TD: Tensor) -> Tensor:
        """Return forward(x) + residual."""
        if self.down.takes_ends:
            return self.down.with_end(self.gated(x_TD), residual=residual_TD)
        return residual_TD + self(x_TD)

    def gated(self, x_TD: Tensor) -> Tensor:
        """Return activation(gate(x)) * up(x), in one kernel where the product takes it along."""
        op = OPS_OF[self.activation_name]
        is_outside = op in KERNELS.on_cpu or op in KERNELS.on_gpu
        if self.gate_up.takes_ends and not is_outside:
            return self.gate_up.with_end(x_TD, activation=self.activation_name)
        gate_up_TF = self.gate_up(x_TD)
        is_op = gate_up_TF.is_cuda or op in KERNELS.on_cpu
        return (ACTIVATION_OPS[self.activation_name] if is_op else self.activation)(gate_up_TF)


class MLP(nn.Module):
    """Up, activation, down. Raises ConfigError for an activation it does not know."""

    def __init__(
        self,
        build: BuildContext,
        hidden_size: int,
        intermediate_size: int,
        *,
        activation: str,
        bias: bool = False,
    ) -> None:
        super().__init__()
        _check_known(activation, PLAIN_ACTIVATIONS)
        self.activation, self.activation_name = PLAIN_ACTIVATIONS[activation], activation
        self.up = ColumnParallelLinear(build, hidden_size, intermediate_size, bias=bias)
        self.down = RowParallelLinear(build, intermediate_size, hidden_size, bias=bias)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.down(self.activation(self.up(x_TD)))


def _check_known(activation: str, known: Iterable[str]) -> None:
    if activation not in known:
        raise ConfigError(
            f"Unknown activation {activation!r}; valid: {', '.join(known)}.{nearest(activation, known)}"
        )
