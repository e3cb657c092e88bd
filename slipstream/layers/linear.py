"""How do inputs meet weights, on one rank or several? The linear family.

A column-parallel layer owns some outputs, a row-parallel one some inputs, whose partial sums are reduced.
Fused layers (q, k, v; gate, up) are one GEMM over several slots.
Invariant: the base GEMM and its epilogue (bias, reduction) are separate steps, and adapters add between them;
a layer runs once per step whatever the batch.
Source: Shoeybi et al., Megatron-LM, arXiv 1909.08053, section 3.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from slipstream.core.errors import ConfigError
from slipstream.kernels.scaled_linear import NUM_COUNTERS
from slipstream.layers.build_context import BuildContext
from slipstream.layers.packed_parameter import PackedParameter
from slipstream.layers.parameter import Parameter, Slot, even_slot
from slipstream.quant.base import EndingQuantMethod, TensorSpec


class Linear(nn.Module):
    """Base of the family: y = epilogue(gemm(x)). Sizes are this rank's, slots its share."""

    _zeros: Tensor | None = None

    def __init__(
        self,
        build: BuildContext,
        *,
        in_features: int,
        out_features: int,
        bias: bool,
        out_slots: dict[str, Slot] | None = None,
        in_slot: Slot | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.mesh, self.quant = build.mesh, build.quant
        specs = self.quant.create(in_features=in_features, out_features=out_features, dtype=build.dtype)
        for name, spec in specs.items():
            self.register_parameter(name, _parameter(spec, build, out_slots, in_slot))
        self.bias: Parameter | None = None
        if bias:
            self.bias = Parameter.create(
                (out_features,),
                dtype=build.dtype,
                device=build.device,
                dim=0 if out_slots else None,
                slots=out_slots,
            )

    def forward(self, x: Tensor) -> Tensor:
        return self.epilogue(self.gemm(x))

    @property
    def counters(self) -> Tensor:
        """Return zeros for kernels that cut the product; made once, for captured steps hold their address."""
        counters, weight = self._zeros, cast(Tensor, self.weight)
        if counters is None or counters.device != weight.device:
            self._zeros = counters = torch.zeros(NUM_COUNTERS, dtype=torch.int32, device=weight.device)
        return counters

    def gemm(self, x: Tensor) -> Tensor:
        """Return the base product; an adapter's delta is added to this, before the epilogue."""
        return self.quant.apply(self, x)

    def epilogue(self, y: Tensor) -> Tensor:
        return y if self.bias is None else y.add_(self.bias)

    @property
    def takes_ends(self) -> bool:
        """Say whether `with_end` may be called: nothing stands between the product and what follows."""
        return self.quant.capability.takes_ends and self.bias is None and self.mesh.tp_size == 1

    def with_end(self, x: Tensor, *, activation: str = "", residual: Tensor | None = None) -> Tensor:
        """Return act(forward(x)) + residual, computed together; a gated `activation` or "" for none."""
        return cast(EndingQuantMethod, self.quant).apply_with_end(self, x, activation, residual)


class ColumnParallelLinear(Linear):
    """Every rank computes its share of the outputs from all inputs."""

    def __init__(
        self, build: BuildContext, in_features: int, out_features: int, *, bias: bool = False
    ) -> None:
        out = build.divide(out_features, "the number of outputs")
        slot = even_slot(out_features, rank=build.mesh.tp_rank, size=build.mesh.tp_size)
        super().__init__(build, in_features=in_features, out_features=out, bias=bias, out_slots={"": slot})


class RowParallelLinear(Linear):
    """Every rank computes partial sums of all outputs from its share of inputs; the epilogue reduces."""

    def __init__(
        self, build: BuildContext, in_features: int, out_features: int, *, bias: bool = False
    ) -> None:
        share = build.divide(in_features, "the number of inputs")
        slot = even_slot(in_features, rank=build.mesh.tp_rank, size=build.mesh.tp_size)
        super().__init__(build, in_features=share, out_features=out_features, bias=bias, in_slot=slot)

    def epilogue(self, y: Tensor) -> Tensor:
        # The bias is whole on every rank, so it joins after the reduction, once.
        return super().epilogue(self.mesh.all_reduce(y))


class QKVLinear(Linear):
    """Queries, keys and values in one GEMM; slots "q", "k", "v", in that order along the outputs.

    With fewer kv heads than ranks, consecutive ranks hold copies of one kv head.
    """

    def __init__(
        self,
        build: BuildContext,
        in_features: int,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        bias: bool = False,
    ) -> None:
        size, rank = build.mesh.tp_size, build.mesh.tp_rank
        heads = build.divide(num_heads, "the number of attention heads")
        kv_heads = local_kv_heads(num_kv_heads, size)
        kv_start = (rank * num_kv_heads // size) * head_dim
        q_len, kv_len = heads * head_dim, kv_heads * head_dim
        slots = {
            "q": Slot(num_heads * head_dim, rank * q_len, q_len, 0),
            "k": Slot(num_kv_heads * head_dim, kv_start, kv_len, q_len),
            "v": Slot(num_kv_heads * head_dim, kv_start, kv_len, q_len + kv_len),
        }
        super().__init__(
            build, in_features=in_features, out_features=q_len + 2 * kv_len, bias=bias, out_slots=slots
        )
        self.num_heads, self.num_kv_heads, self.head_dim = heads, kv_heads, head_dim


class GateUpLinear(Linear):
    """Gate and up projection in one GEMM; slots "gate", "up", in that order along the outputs."""

    def __init__(
        self, build: BuildContext, in_features: int, out_features: int, *, bias: bool = False
    ) -> None:
        share = build.divide(out_features, "the intermediate size")
        mesh = build.mesh
        slots = {
            "gate": even_slot(out_features, rank=mesh.tp_rank, size=mesh.tp_size),
            "up": even_slot(out_features, rank=mesh.tp_rank, size=mesh.tp_size, offset=share),
        }
        super().__init__(build, in_features=in_features, out_features=2 * share, bias=bias, out_slots=slots)


def local_kv_heads(num_kv_heads: int, tp_size: int) -> int:
    """Return the kv heads of one tensor rank. Raises ConfigError where neither count divides the other."""
    if num_kv_heads % tp_size == 0:
        return num_kv_heads // tp_size
    if tp_size % num_kv_heads == 0:
        return 1
    raise ConfigError(
        f"{num_kv_heads} key-value heads cannot be shared by {tp_size} tensor ranks; use a "
        "tensor_parallel_size that divides the number of key-value heads or is a multiple of it."
    )


def _parameter(
    spec: TensorSpec, build: BuildContext, out_slots: dict[str, Slot] | None, in_slot: Slot | None
) -> Parameter:
    if spec.packing is not None:
        is_by_rows = out_slots is not None
        return PackedParameter.create_packed(
            spec.shape,
            spec.packing,
            device=build.device,
            dim=0 if is_by_rows else 1,
            slots=out_slots if is_by_rows else ({"": in_slot} if in_slot is not None else None),
        )
    dim, slots = None, None
    if out_slots is not None and spec.out_dim is not None:
        dim, slots = spec.out_dim, {name: slot.divided(spec.out_step) for name, slot in out_slots.items()}
    elif in_slot is not None and spec.in_dim is not None:
        dim, slots = spec.in_dim, {"": in_slot.divided(spec.in_step)}
    return Parameter.create(spec.shape, dtype=spec.dtype, device=build.device, dim=dim, slots=slots)
