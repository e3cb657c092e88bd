"""What does every layer need to build itself? Its peers, how weights are kept, their type and place."""

from __future__ import annotations

import dataclasses

import torch

from slipstream.core.errors import ConfigError
from slipstream.parallel.mesh import Mesh
from slipstream.quant.base import QuantMethod
from slipstream.quant.unquantized import Unquantized


@dataclasses.dataclass(frozen=True, kw_only=True)
class BuildContext:
    """Passed down unchanged while a model builds its layers."""

    mesh: Mesh = dataclasses.field(default_factory=Mesh)
    quant: QuantMethod = dataclasses.field(default_factory=Unquantized)
    dtype: torch.dtype = torch.float32
    device: torch.device | str = "cpu"

    def divide(self, total: int, what: str) -> int:
        """Return `total` per tensor rank. Raises ConfigError where it does not divide evenly."""
        size = self.mesh.tp_size
        if total % size:
            raise ConfigError(
                f"{what} is {total}, which {size} tensor ranks cannot share evenly; "
                f"use a tensor_parallel_size that divides {total}."
            )
        return total // size
