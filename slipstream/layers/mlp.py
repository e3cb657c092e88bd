"""What happens to a token between attentions? The gated MLP: down(activation(gate(x)) * up(x))."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from slipstream.core.errors import ConfigError
from slipstream.kernels.gelu_and_mul import gelu_and_mul, gelu_tanh_and_mul
from slipstream.kernels.silu_and_mul import silu_and_mul
from slipstream.layers.build_context import BuildContext
from slipstream.layers.linear import GateUpLinear, RowParallelLinear

# Hugging Face's names of activations; each takes gate and up side by side.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": silu_and_mul,
    "swish": silu_and_mul,
    "gelu": gelu_and_mul,
    "gelu_pytorch_tanh": gelu_tanh_and_mul,
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
        if activation not in ACTIVATIONS:
            raise ConfigError(f"Unknown activation {activation!r}; valid: {', '.join(ACTIVATIONS)}.")
        self.activation = ACTIVATIONS[activation]
        self.gate_up = GateUpLinear(build, hidden_size, intermediate_size, bias=bias)
        self.down = RowParallelLinear(build, intermediate_size, hidden_size, bias=bias)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.down(self.activation(self.gate_up(x_TD)))
