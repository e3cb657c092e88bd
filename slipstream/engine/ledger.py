# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""Where does the memory of a device go? One record, in bytes, printed at start and with every shortage.

Invariant: what stands here was counted or measured, never guessed; what cannot be measured on a device (the
workspace of steps on a CPU, whose allocator tells nobody) is None and said so.
"""

from __future__ import annotations

import dataclasses
import gc
from typing import Any, Protocol

import psutil
import torch
from torch import Tensor


class DeviceMemory(Protocol):
    """What is asked of a device's memory. `can_measure` says whether `growth` means anything there."""

    @property
    def can_measure(self) -> bool: ...

    @property
    def total(self) -> int: ...

    def free(self) -> int:
        """Return what could be allocated now, unused memory of our allocator included."""
        ...

    def held(self) -> int:
        """Return what our tensors hold."""
        ...

    def outside(self) -> int:
        """Return what is taken by others than our allocator: the driver, captured steps' code, programs."""
        ...

    def start(self) -> None:
        """Begin to watch the most that is taken."""
        ...

    def growth(self) -> int:
        """Return the most that was taken at one time since `start`, beyond what was held then."""
        ...

    def settle(self) -> None:
        """Give back what nobody uses, so that the next figures are those of what is kept."""
        ...


class CudaMemory:
    """A GPU's, by torch's allocator and the driver."""

    can_measure = True

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.total: int = torch.cuda.mem_get_info(device)[1]
        self._at_start = (0, 0)

    def free(self) -> int:
        unused = torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
        return torch.cuda.mem_get_info(self._device)[0] + unused

    def held(self) -> int:
        return torch.cuda.memory_allocated(self._device)

    def outside(self) -> int:
        return (
            self.total - torch.cuda.mem_get_info(self._device)[0] - torch.cuda.memory_reserved(self._device)
        )

    def start(self) -> None:
        self.settle()
        torch.cuda.reset_peak_memory_stats(self._device)
        self._at_start = (0, 0)
        self._at_start = self._growth()

    def growth(self) -> int:
        torch.cuda.synchronize(self._device)
        return max(self._growth())

    def _growth(self) -> tuple[int, int]:
        """Return the most that was reserved and allocated, beyond that at the start.

        Reserved is more by what the allocator cannot use between blocks, and less where it found room in
        what others left half empty.
        """
        reserved, allocated = self._at_start
        most = torch.cuda.max_memory_reserved(self._device), torch.cuda.max_memory_allocated(self._device)
        return most[0] - reserved, most[1] - allocated

    def settle(self) -> None:
        gc.collect()
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()


class HostMemory:
    """A CPU's, by the operating system."""

    can_measure = False

    def __init__(self) -> None:
        self.total = psutil.virtual_memory().total

    def free(self) -> int:
        return psutil.virtual_memory().available

    def held(self) -> int:
        return 0

    def outside(self) -> int:
        return self.total - self.free()

    def start(self) -> None:
        """There is nothing to watch."""

    def growth(self) -> int:
        return 0

    def settle(self) -> None:
        """Freed memory goes back by itself."""


def memory_of(device: torch.device) -> DeviceMemory:
    return CudaMemory(device) if device.type == "cuda" else HostMemory()


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Ledger:
    """All of a device's memory, as it stands when the engine is ready.

    `state_bytes` are the rows of running requests and what sampling remembers; `workspace_bytes` the most
    that a step takes for itself, `graph_bytes` what every captured step may come to hold. `other_bytes` are
    other programs', and the driver's. None is what could not be measured.
    """

    device: str
    total_bytes: int
    other_bytes: int
    weight_bytes: int
    state_bytes: int
    workspace_bytes: int | None
    graph_bytes: int
    kv_bytes: int

    @property
    def free_bytes(self) -> int:
        known = (self.other_bytes, self.weight_bytes, self.state_bytes, self.graph_bytes, self.kv_bytes)
        return self.total_bytes - sum(known) - (self.workspace_bytes or 0)

    def line(self, tokens: str = "") -> str:
        """Return the record as one line; `tokens` says what the KV cache comes to."""
        is_measured = self.workspace_bytes is not None
        workspace = f"{self.workspace_bytes:,} bytes" if is_measured else "not measured on this device"
        graphs = f", captured steps {self.graph_bytes:,} bytes" if self.graph_bytes else ""
        return (
            f"memory: weights {self.weight_bytes:,} bytes, KV cache {self.kv_bytes:,} bytes"
            f"{f' ({tokens})' if tokens else ''}, rows {self.state_bytes:,} bytes, workspace of a step "
            f"{workspace}{graphs}, others {self.other_bytes:,} bytes, free {self.free_bytes:,} of "
            f"{self.total_bytes:,} bytes"
        )


def tensor_bytes(*owners: Any) -> int:
    """Return the bytes of the tensors that are attributes of these objects."""
    tensors = {
        id(value): value for owner in owners for value in vars(owner).values() if isinstance(value, Tensor)
    }
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors.values()}
    return sum(storage.nbytes() for storage in storages.values())
