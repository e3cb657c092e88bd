"""Where does this rank stand along each parallel axis, and how does it talk to its peers there?

Invariant: building a mesh touches no process group, so a single process can build every shard of a model;
only a collective needs one. At size 1 a collective returns its argument unchanged.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from slipstream.core.errors import ConfigError, EngineError

if TYPE_CHECKING:
    from torch import Tensor

AXES = ("tp", "pp", "dp", "ep", "cp")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mesh:
    """Sizes and ranks of the tensor, pipeline, data, expert and context axes.

    The collectives below run over the tensor axis. Raises ConfigError for a size below 1 or a rank outside
    its axis.
    """

    tp_size: int = 1
    tp_rank: int = 0
    pp_size: int = 1
    pp_rank: int = 0
    dp_size: int = 1
    dp_rank: int = 0
    ep_size: int = 1
    ep_rank: int = 0
    cp_size: int = 1
    cp_rank: int = 0

    def __post_init__(self) -> None:
        for axis in AXES:
            size, rank = getattr(self, f"{axis}_size"), getattr(self, f"{axis}_rank")
            if size < 1:
                raise ConfigError(f"{axis}_size is {size}; it must be at least 1.")
            if not 0 <= rank < size:
                raise ConfigError(f"{axis}_rank is {rank}; with {axis}_size {size} it must be 0..{size - 1}.")

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum `x` over the tensor axis, in place, and return it. Blocks the caller's stream, not the host."""
        if self.tp_size == 1:
            return x
        distributed = self._process_group("all_reduce")
        distributed.all_reduce(x)
        return x

    def all_gather(self, x: Tensor, dim: int) -> Tensor:
        """Concatenate the equally shaped `x` of every tensor rank along `dim`, in rank order."""
        if self.tp_size == 1:
            return x
        import torch

        distributed = self._process_group("all_gather")
        parts = [torch.empty_like(x) for _ in range(self.tp_size)]
        distributed.all_gather(parts, x.contiguous())
        return torch.cat(parts, dim)

    def _process_group(self, collective: str):
        """Return `torch.distributed`, or raise EngineError where the default group is not this mesh's."""
        import torch.distributed as distributed

        if not distributed.is_available() or not distributed.is_initialized():
            raise EngineError(
                f"{collective} over {self.tp_size} tensor ranks needs a process group and there is none; "
                "start one process per rank with torch.distributed.init_process_group, or use tp_size=1."
            )
        if distributed.get_world_size() != self.tp_size or distributed.get_rank() != self.tp_rank:
            raise EngineError(
                f"{collective} runs over the default process group, rank {distributed.get_rank()} of "
                f"{distributed.get_world_size()}; the mesh is tensor rank {self.tp_rank} of {self.tp_size}. "
                "Start exactly one process per tensor rank."
            )
        return distributed
