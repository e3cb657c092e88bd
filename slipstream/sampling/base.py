"""What does a sampling step hand back? Device tensors, readable on the host once somebody asks.

Invariant: making a `SampleOutput` never waits for the device; reading from it does.
Shapes: R sampled rows, L of them with logprobs, K their longest list of leading tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Final, cast

import numpy as np
import torch
from torch import Tensor

from slipstream.core.plan import Candidates, TokenLogprobs
from slipstream.sampling.continuations import unpack_continuations

OK: Final = 0
BAD_LOGITS: Final = 1  # NaN or +Inf came out of the model
ALL_MASKED: Final = 2  # no token is allowed
STATUS_TEXT: Final = {
    BAD_LOGITS: "the model produced NaN or infinite logits",
    ALL_MASKED: "every token of the vocabulary is masked",
}
NUM_SCALARS = 4


class HostCopy:
    """A tensor on its way to the host; on a CPU it already is there."""

    def __init__(self, tensor: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._host = tensor
        if tensor.device.type == "cuda":
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def numbers(self) -> list[Any]:
        """Wait for this copy alone, not for steps launched after it."""
        return cast(Any, self._waited()).tolist()

    def array(self) -> Any:
        """Return a numpy array over the copy's own memory, as `numbers` waits for it."""
        return cast(Any, self._waited()).numpy()

    def _waited(self) -> Tensor:
        if self._event is not None:
            self._event.synchronize()
        return self._host


@dataclasses.dataclass(slots=True)
class PackedLogprobs:
    """Logprobs of L rows in one float64 tensor [L, 4 + 2K], one copy to the host.

    Columns: token id, logprob, rank, status, K leading ids, K leading logprobs (ids are exact in float64).
    `place[i]` is the packed row of batch row i, `num_top[i]` how many leading tokens it asked for.
    """

    packed: Tensor
    place: dict[int, int]
    num_top: dict[int, int]


@dataclasses.dataclass(slots=True)
class PackedContinuations:
    """Continuations of rows of a search in one float64 tensor [C, 3K], packed by `pack_continuations`.

    `place[i]` is the packed row of batch row i, `count[i]` how many it asked for.
    """

    packed: Tensor
    place: dict[int, int]
    count: dict[int, int]


@dataclasses.dataclass(slots=True)
class SampleOutput:
    """One token per row, in the order of the rows sampled: int64 `token_ids_R`, int8 `status_R` (see above).

    A row whose status is not OK has token 0. `start_copy` begins the transfer to the host without waiting, in
    one copy; without it the first read copies. What reads on the host blocks until the step is done.
    """

    token_ids_R: Tensor
    status_R: Tensor
    logprobs: PackedLogprobs | None = None
    continuations: PackedContinuations | None = None
    _copy: HostCopy | None = None
    _parts: list[Any] | None = None

    def start_copy(self) -> None:
        if self._copy is None:
            packed = [table.packed for table in self._tables()]
            # Ids and statuses are exact in float64.
            dtype = torch.float64 if packed else torch.int64
            tensors = [self.token_ids_R, self.status_R, *packed]
            self._copy = HostCopy(torch.cat([tensor.flatten().to(dtype) for tensor in tensors]))

    def _tables(self) -> list[PackedLogprobs | PackedContinuations]:
        return [table for table in (self.logprobs, self.continuations) if table is not None]

    def _read(self) -> list[Any]:
        """Return ids, statuses, and the tables there are, as numpy arrays."""
        if self._parts is None:
            self.start_copy()
            assert self._copy is not None
            whole, count = self._copy.array(), len(self.token_ids_R)
            self._parts = [whole[:count].astype(np.int64), whole[count : 2 * count].astype(np.int64)]
            start = 2 * count
            for lines, width in (table.packed.shape for table in self._tables()):
                self._parts.append(whole[start : start + lines * width].reshape(lines, width))
                start += lines * width
        return self._parts

    def tokens(self) -> list[int]:
        return self._read()[0].tolist()

    def statuses(self) -> list[int]:
        return self._read()[1].tolist()

    def logprobs_by_row(self) -> dict[int, TokenLogprobs]:
        """Return the logprobs of the batch rows that ask and did not fail."""
        table = self.logprobs
        if table is None:
            return {}
        found = unpack_logprobs(self._read()[2], list(table.num_top.values()))
        return {i: one for i, one in zip(table.place, found, strict=True) if one is not None}

    def continuations_by_row(self) -> dict[int, Candidates]:
        """Return how the batch rows that ask could go on; empty where none asks."""
        table = self.continuations
        if table is None:
            return {}
        lines = self._read()[-1].tolist()
        return {i: unpack_continuations(lines[place], table.count[i]) for i, place in table.place.items()}


def unpack_wide_logprobs(lines: Any, num_top: Sequence[int]) -> list[TokenLogprobs | None]:
    """Read packed rows that have more columns than any of them wants leading tokens."""
    most, room = max(num_top, default=0), (lines.shape[1] - NUM_SCALARS) // 2
    ends = (NUM_SCALARS + most, NUM_SCALARS + room, NUM_SCALARS + room + most)
    return unpack_logprobs(np.concatenate((lines[:, : ends[0]], lines[:, ends[1] : ends[2]]), 1), num_top)


def unpack_logprobs(lines: Any, num_top: Sequence[int]) -> list[TokenLogprobs | None]:
    """Read packed rows, a float64 array [L, 4 + 2K]; row i has its first `num_top[i]` leading tokens.

    None where a row's status is not OK. Whole columns become lists at once, for numbers one by one cost more.
    """
    half = NUM_SCALARS + (lines.shape[1] - NUM_SCALARS) // 2
    ids, ranks, statuses = lines[:, [0, 2, 3]].astype(np.int64).T.tolist()
    values = lines[:, 1].tolist()
    top_ids, top_values = lines[:, NUM_SCALARS:half].astype(np.int64).tolist(), lines[:, half:].tolist()
    if any(count < half - NUM_SCALARS for count in num_top):
        top_ids = [row[:count] for row, count in zip(top_ids, num_top, strict=True)]
        top_values = [row[:count] for row, count in zip(top_values, num_top, strict=True)]
    tops = [list(zip(*pair, strict=True)) for pair in zip(top_ids, top_values, strict=True)]
    found: list[TokenLogprobs | None] = list(map(TokenLogprobs, ids, values, ranks, tops))
    if any(statuses):
        found = [one if status == OK else None for one, status in zip(found, statuses, strict=True)]
    return found
