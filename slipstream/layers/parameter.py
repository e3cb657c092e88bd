"""Which part of a checkpoint's tensor is this rank's, and where in the parameter does it go?

A parameter owns its shard rule: the dimension that is cut and the slots along it that tensors fuse into
(q, k, v; gate, up). Memory is allocated once and filled in place, a chunk of rows at a time.
Invariant: a placed tensor has exactly the shape the rule expects, and no chunk is much larger than
`CHUNK_BYTES`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from slipstream.checkpoint.base import WeightTensor
from slipstream.core.errors import CheckpointError

CHUNK_BYTES = 8 << 20
PLAIN_DTYPES = frozenset({"F64", "F32", "F16", "BF16"})


@dataclasses.dataclass(frozen=True, slots=True)
class Slot:
    """`length` indices from `start` of a tensor that has `full` along the cut dimension, kept at `offset`."""

    full: int
    start: int
    length: int
    offset: int = 0

    def divided(self, step: int) -> Slot:
        """Return the slot of a tensor that holds one element per `step` of these indices."""
        return Slot(self.full // step, self.start // step, self.length // step, self.offset // step)


def even_slot(full: int, *, rank: int, size: int, offset: int = 0) -> Slot:
    """Return rank's share of `full` indices, which `size` divides."""
    return Slot(full, rank * (full // size), full // size, offset)


class Parameter(nn.Parameter):
    """A frozen tensor that knows its shard rule. Make one with `create`."""

    dim: int | None
    slots: dict[str, Slot]

    @classmethod
    def create(
        cls,
        shape: Sequence[int],
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        dim: int | None = None,
        slots: dict[str, Slot] | None = None,
    ) -> Parameter:
        """Allocate without touching the memory. Without `dim` every rank holds the whole tensor."""
        parameter = cls(torch.empty(tuple(shape), dtype=dtype, device=device), requires_grad=False)
        parameter.dim = dim
        whole = Slot(shape[dim or 0], 0, shape[dim or 0])
        parameter.slots = dict(slots) if slots is not None else {"": whole}
        return parameter

    def expected_shape(self, slot: str = "") -> tuple[int, ...]:
        """Return the shape the checkpoint's tensor of `slot` must have."""
        shape = list(self.shape)
        shape[self.dim or 0] = self.slots[slot].full
        return tuple(shape)

    def place(
        self,
        tensor: WeightTensor,
        slot: str = "",
        transform: Callable[[Tensor], Tensor] | None = None,
        row_multiple: int = 1,
    ) -> None:
        """Stream this rank's part of `tensor` into `slot`, converting to the parameter's type.

        `transform` maps a chunk of whole rows, a multiple of `row_multiple` of them, to a chunk of the same
        shape. Raises CheckpointError for a wrong shape, and for NaN or infinity in a vector (norms, biases)
        or in what a quantised type's scales produce.
        """
        self.check_shape(tensor, slot)
        rule = self.slots[slot]
        is_cut_by_rows = (self.dim or 0) == 0
        first, rows = (rule.start, rule.length) if is_cut_by_rows else (0, tensor.shape[0])
        target = self.data if is_cut_by_rows else self.data.narrow(self.dim or 0, rule.offset, rule.length)
        at = rule.offset if is_cut_by_rows else 0
        is_checked = len(tensor.shape) == 1 or tensor.dtype not in PLAIN_DTYPES
        for start, stop in row_chunks(tensor, first, rows, row_multiple):
            chunk = tensor.read(start, stop)
            if is_checked and not bool(chunk.sum().isfinite()):
                _refuse_non_finite(tensor, chunk, start)
            chunk = transform(chunk) if transform else chunk
            if not is_cut_by_rows:
                chunk = chunk.narrow(self.dim or 0, rule.start, rule.length)
            target[at + start - first : at + stop - first].copy_(chunk)

    def check_shape(self, tensor: WeightTensor, slot: str = "") -> None:
        """Raise CheckpointError unless `tensor` has the shape `slot` expects."""
        expected = self.expected_shape(slot)
        if tuple(tensor.shape) != expected:
            raise CheckpointError(
                f"Tensor {tensor.name!r} has shape {list(tensor.shape)}; the model's configuration asks for "
                f"{list(expected)}. The weights and the configuration are not of the same model."
            )


def row_chunks(tensor: WeightTensor, first: int, rows: int, multiple: int) -> Iterator[tuple[int, int]]:
    """Yield [start, stop) over `rows` rows from `first`, each chunk about `CHUNK_BYTES` of float32."""
    row_bytes = 4
    for size in tensor.shape[1:]:
        row_bytes *= size
    step = max(1, CHUNK_BYTES // max(1, row_bytes) // multiple) * multiple
    for start in range(first, first + rows, step):
        yield start, min(start + step, first + rows)


def _refuse_non_finite(tensor: WeightTensor, chunk: Tensor, start: int) -> None:
    bad = (~chunk.isfinite()).reshape(chunk.shape[0], -1).any(1).nonzero()
    if bad.numel():
        raise CheckpointError(
            f"Tensor {tensor.name!r} ({tensor.dtype}) holds NaN or infinity in row {start + int(bad[0])}; "
            "the file is damaged or was written wrongly: fetch it again."
        )
