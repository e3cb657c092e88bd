"""Which row does a running sequence have, and is it in its prompt or past it?

Invariant: a row freed in one plan reaches the runner as `removed` in the next launched plan, and may be given
out again in that same plan, since a plan removes before it adds.
"""

from __future__ import annotations

from slipstream.engine.sequence import Sequence


class RowAllocation:
    """Rows of the runner: free ones, those in their prompt (oldest first) and those that decode."""

    def __init__(self, num_rows: int) -> None:
        self.prefilling: list[Sequence] = []
        self.decoding: dict[int, Sequence] = {}
        self._free = list(range(num_rows - 1, -1, -1))
        self._removed: list[int] = []
        self.num_rows = num_rows
        # Rows kept back for sequences that running ones may still split into.
        self.num_reserved = 0

    def __len__(self) -> int:
        return len(self.decoding) + len(self.prefilling)

    @property
    def has_free(self) -> bool:
        return len(self._free) > self.num_reserved

    @property
    def num_free(self) -> int:
        return len(self._free) - self.num_reserved

    def running(self) -> list[Sequence]:
        return [*self.decoding.values(), *self.prefilling]

    def begin_plan(self) -> list[int]:
        """Return the rows that this plan removes; they are free for it."""
        removed, self._removed = self._removed, []
        self._free += removed
        return removed

    def cancel_plan(self, removed: list[int]) -> None:
        """Undo `begin_plan` for a plan that is not launched and so admitted nobody."""
        self._removed = removed + self._removed
        del self._free[len(self._free) - len(removed) :]

    def start(self, sequence: Sequence) -> None:
        sequence.row = self._free.pop()
        self.prefilling.append(sequence)

    def begin_decoding(self, sequence: Sequence) -> None:
        self.prefilling.remove(sequence)
        self.decoding[sequence.row] = sequence

    def start_fork(self, sequence: Sequence) -> None:
        """Give a fork one of the rows that were kept back for it; it decodes at once."""
        sequence.row = self._free.pop()
        self.num_reserved -= 1
        self.decoding[sequence.row] = sequence

    def leave(self, sequence: Sequence) -> None:
        if self.decoding.get(sequence.row) is sequence:
            del self.decoding[sequence.row]
        else:
            self.prefilling.remove(sequence)
        self._removed.append(sequence.row)
        sequence.row = -1
