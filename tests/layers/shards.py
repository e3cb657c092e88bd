"""How does a test run two tensor ranks in one process? Collectives that only collect."""

from __future__ import annotations

import dataclasses

import torch

from slipstream.layers.build_context import BuildContext
from slipstream.layers.parameter import Parameter
from slipstream.parallel.mesh import Mesh


@dataclasses.dataclass(frozen=True, kw_only=True)
class LocalMesh(Mesh):
    """A rank whose reductions return its own part; the test adds the parts up."""

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def all_gather(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        return x


def contexts(size: int = 2) -> list[BuildContext]:
    return [BuildContext(mesh=LocalMesh(tp_size=size, tp_rank=rank)) for rank in range(size)]


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def fill(parameter: Parameter, whole: torch.Tensor, slot: str = "") -> None:
    """Place this rank's share of `whole` as a checkpoint would."""
    from slipstream.checkpoint.base import WeightTensor

    shape = tuple(whole.shape)
    parameter.place(WeightTensor("w", shape, "F32", whole.nbytes, lambda a, b: whole[a:b]), slot)
