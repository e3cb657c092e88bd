"""How does a weight get into a packed form while it streams? One matrix a slot, a run of rows at a time.

A fused layer's slots (q, k, v) may be of different types, as files mix them, so each slot is a matrix of its
own. What a type becomes is the quantisation method's choice; memory is allocated when a tensor is placed.
Invariant: rows arrive in order and in whole tiles, so that no float copy of a tensor is ever made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from slipstream.checkpoint.base import WeightTensor
from slipstream.core.errors import CheckpointError, UnsupportedError
from slipstream.kernels.cpu.packed_matrix import TILE_ROWS, PackedMatrix
from slipstream.layers.parameter import Parameter, Slot, row_chunks
from slipstream.quant.base import Packing


class PackedParameter(Parameter):
    """A matrix [out, in] of one or several slots. As a tensor it is empty: see `matrices`."""

    packing: Packing
    full_shape: tuple[int, int]
    matrices: dict[str, PackedMatrix]

    @classmethod
    def create_packed(
        cls,
        shape: Sequence[int],
        packing: Packing,
        *,
        device: torch.device | str,
        dim: int | None,
        slots: dict[str, Slot] | None,
    ) -> PackedParameter:
        """Describe a parameter, without memory. Raises UnsupportedError for a share of a tensor rank."""
        parameter = cls(torch.empty(0, dtype=torch.uint8, device=device), requires_grad=False)
        rows, cols = shape
        parameter.dim = 0
        parameter.slots = dict(slots) if slots is not None and dim == 0 else {"": Slot(rows, 0, rows)}
        is_whole = all(slot.length == slot.full for slot in (slots or {}).values())
        if not is_whole:
            raise UnsupportedError("Packed CPU weights are not cut over tensor ranks; use one.")
        parameter.packing, parameter.full_shape, parameter.matrices = packing, (rows, cols), {}
        return parameter

    @property
    def nbytes(self) -> int:
        return sum(matrix.num_bytes for matrix in self.matrices.values())

    def expected_shape(self, slot: str = "") -> tuple[int, ...]:
        return (self.slots[slot].full, self.full_shape[1])

    def in_order(self) -> list[PackedMatrix]:
        """Return the slots' matrices along the outputs."""
        return [self.matrices[name] for name in sorted(self.slots, key=lambda name: self.slots[name].offset)]

    def place(
        self,
        tensor: WeightTensor,
        slot: str = "",
        transform: Callable[[Tensor], Tensor] | None = None,
        row_multiple: int = 1,
    ) -> None:
        """Pack `tensor` into `slot`. Raises CheckpointError for a wrong shape and for scales not finite."""
        self.check_shape(tensor, slot)
        rows, cols = self.expected_shape(slot)
        kind = self.packing.kind_of(tensor.dtype)
        is_kept = kind.keeps(tensor.dtype)
        source = tensor.dtype if is_kept else "F32"
        matrix = PackedMatrix.empty(kind, rows=rows, cols=cols, arena=self.packing.arena)
        multiple = row_multiple * TILE_ROWS
        for start, stop in row_chunks(tensor, 0, rows, multiple):
            if is_kept and tensor.read_raw is not None:
                chunk = torch.from_numpy(tensor.read_raw(start, stop))
            else:
                chunk = tensor.read(start, stop)
                chunk = chunk if is_kept else chunk.float()
            # A change of the order of rows is the same for their bytes.
            chunk = transform(chunk) if transform else chunk
            if not matrix.pack(chunk.contiguous(), source, first_row=start):
                raise CheckpointError(
                    f"Tensor {tensor.name!r} ({tensor.dtype}) holds NaN or infinity in rows {start} to "
                    f"{stop}; the file is damaged or was written wrongly: fetch it again."
                )
        self.matrices[slot] = matrix
