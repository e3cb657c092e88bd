# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""What does a step bring beside tokens? Prompt logprobs, logits and hidden states, as a plan asks for them.

Invariant: logits of many positions are computed in parts of at most `MAX_PART_BYTES` on the device and leave
for the host at once; nothing here waits for the device before `read`.
Shapes: T tokens of the step, C positions of a part, D hidden size, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from slipstream.core.plan import LogitsKind, StepPlan
from slipstream.engine.rows import Rows
from slipstream.sampling.base import HostCopy, unpack_logprobs
from slipstream.sampling.logprobs import pack_logprobs

MAX_PART_BYTES = 64 * 2**20

# (what, first position, values) of one row.
Extra = tuple[LogitsKind, int, Any]


@dataclasses.dataclass(slots=True)
class Wanted:
    """Parts on their way to the host, each of consecutive positions of one row."""

    row: int
    start: int
    kind: LogitsKind
    parts: list[HostCopy]
    num_top: int

    def read(self) -> Extra:
        """Wait for the parts and join them."""
        if self.kind == "prompt_logprobs":
            lines = (part.array() for part in self.parts)
            found = [unpack_logprobs(part, [self.num_top] * len(part)) for part in lines]
            return self.kind, self.start, [one for part in found for one in part]
        arrays = [part.array() for part in self.parts]
        return self.kind, self.start, arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


class WantedLogits:
    """Answers `plan.logits` over the rows of an engine."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows
        self._num_top: dict[int, int] = {}

    def apply(self, plan: StepPlan) -> None:
        """Remember how many tokens the prompt logprobs of each new row list."""
        for init in plan.added:
            self._num_top[init.row] = max(0, init.sampling.prompt_logprobs)

    def compute(
        self, model: Any, plan: StepPlan, hidden_TD: Tensor, logits_RV: Tensor | None
    ) -> list[Wanted]:
        """Start whatever the plan asks for; `logits_RV` of the sampled rows is not yet changed."""
        first_of_row: dict[int, int] = {}
        offset = 0
        for span in plan.spans:
            first_of_row[span.row] = offset - span.start
            offset += span.len
        line_of_row = {row: line for line, row in enumerate(plan.sample)}
        wanted: list[Wanted] = []
        for row, start, length, kind in plan.logits:
            if kind == "generation_logits":
                assert logits_RV is not None, "generation logits are those a token is sampled from"
                line = line_of_row[row]
                # Cloned, since the sampler edits the logits in place.
                parts = [HostCopy(logits_RV[line : line + 1].clone())]
            else:
                first = first_of_row[row] + start
                hidden_CD = hidden_TD[first : first + length]
                parts = list(self._parts(model, hidden_CD, row, start, kind))
            wanted.append(Wanted(row, start, kind, parts, self._num_top[row]))
        return wanted

    def _parts(
        self, model: Any, hidden_CD: Tensor, row: int, start: int, kind: LogitsKind
    ) -> Iterator[HostCopy]:
        if kind == "hidden_states":
            # The forward's own buffer may be reused by the next one.
            yield HostCopy(hidden_CD.float().clone())
            return
        finish: Callable[[Tensor, int], Tensor] = (
            self._logprobs_of(row) if kind == "prompt_logprobs" else lambda logits_CV, _: logits_CV
        )
        size = max(1, MAX_PART_BYTES // (4 * model.config.vocab_size))
        for offset in range(0, len(hidden_CD), size):
            logits_CV = model.logits(hidden_CD[offset : offset + size])
            yield HostCopy(finish(logits_CV, start + offset))

    def _logprobs_of(self, row: int) -> Callable[[Tensor, int], Tensor]:
        """Return a function of (logits, first position): how likely was each position's next token?

        The last position's next token is not of the prompt and not known yet: its line means nothing.
        """

        def pack(logits_CV: Tensor, start: int) -> Tensor:
            next_C = self._rows.tokens[row, start + 1 : start + 1 + len(logits_CV)].to(torch.int64)
            status_C = torch.zeros_like(next_C, dtype=torch.int8)
            return pack_logprobs(logits_CV, next_C, status_C, num_top=self._num_top[row])

        return pack


def read_all(wanted: list[Wanted]) -> dict[int, list[Extra]]:
    """Wait for everything; returns the extras of each row in the order of the plan."""
    extras: dict[int, list[Extra]] = {}
    for one in wanted:
        extras.setdefault(one.row, []).append(one.read())
    return extras
