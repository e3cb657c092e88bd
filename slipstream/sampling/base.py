"""What does a sampling step hand back? Device tensors, readable on the host once somebody asks.

Invariant: making a `SampleOutput` never waits for the device; reading from it does.
Shapes: R sampled rows, L of them with logprobs, K their longest list of leading tokens.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Final, cast

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

    A row whose status is not OK has token 0. `start_copy` begins the transfer to the host without waiting;
    without it the first read copies. `tokens`, `statuses` and `logprobs_of` block until the step is done.
    """

    token_ids_R: Tensor
    status_R: Tensor
    logprobs: PackedLogprobs | None = None
    continuations: PackedContinuations | None = None
    _copies: list[HostCopy] = dataclasses.field(default_factory=list[HostCopy])
    _lines: list[list[float]] = dataclasses.field(default_factory=list[list[float]])

    def start_copy(self) -> None:
        if not self._copies:
            tensors = [self.token_ids_R, self.status_R]
            if self.logprobs is not None:
                tensors.append(self.logprobs.packed)
            if self.continuations is not None:
                tensors.append(self.continuations.packed)
            self._copies = [HostCopy(t) for t in tensors]

    def tokens(self) -> list[int]:
        self.start_copy()
        return self._copies[0].numbers()

    def statuses(self) -> list[int]:
        self.start_copy()
        return self._copies[1].numbers()

    def logprobs_of(self, i: int) -> TokenLogprobs | None:
        """Return row i's logprobs; None where it asked for none or failed."""
        table = self.logprobs
        if table is None or i not in table.place:
            return None
        if not self._lines:
            self.start_copy()
            self._lines = self._copies[2].numbers()
        return unpack_logprobs(self._lines[table.place[i]], table.num_top[i])

    def continuations_by_row(self) -> dict[int, Candidates]:
        """Return how the batch rows that ask could go on; empty where none asks."""
        table = self.continuations
        if table is None:
            return {}
        self.start_copy()
        lines = self._copies[-1].numbers()
        return {i: unpack_continuations(lines[place], table.count[i]) for i, place in table.place.items()}


def unpack_logprobs(line: list[float], num_top: int) -> TokenLogprobs | None:
    """Read one packed row and its first `num_top` leading tokens; None where its status is not OK."""
    token_id, logprob, rank, status = line[:NUM_SCALARS]
    if status != OK:
        return None
    half = (len(line) - NUM_SCALARS) // 2
    ids = line[NUM_SCALARS : NUM_SCALARS + num_top]
    values = line[NUM_SCALARS + half : NUM_SCALARS + half + num_top]
    top = [(int(t), v) for t, v in zip(ids, values, strict=True)]
    return TokenLogprobs(token_id=int(token_id), logprob=logprob, rank=int(rank), top=top)
