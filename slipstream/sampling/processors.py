"""What do a user's own callables do to the logits? `ProcessorTable` keeps them and calls them, row by row.

They are called as TensorRT-LLM calls a LogitsProcessor (in place) or as vLLM calls a function (returning
logits); which, `core.token_rules` read from their signatures. Callables never enter a plan: they are
registered by request id beside it.

Invariant: the ids that a callable sees are all there are, so the engine runs no step ahead while a row here
is running. Whatever a callable raises or returns is the error of its own row.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from slipstream.core.token_rules import LogitsProcessor, ProcessorStyle

logger = logging.getLogger(__name__)

Processors = Sequence[tuple[ProcessorStyle, LogitsProcessor]]
MAX_SHOWN = 200


@dataclasses.dataclass(slots=True)
class ProcessedRow:
    """A running row with callables, and its ids as the host knows them."""

    request_id: str
    tokens: list[int]
    num_prompt: int


class ProcessorTable:
    """Callables by request, rows by number. Used by the engine's thread alone."""

    def __init__(self) -> None:
        self._processors: dict[str, Processors] = {}
        self._rows: dict[int, ProcessedRow] = {}

    def __len__(self) -> int:
        """Return the number of rows whose callables run."""
        return len(self._rows)

    def register(self, request_id: str, processors: Processors) -> None:
        self._processors[request_id] = processors

    def forget(self, request_id: str) -> None:
        """Let go of an ended request's callables; unknown ids are ignored."""
        self._processors.pop(request_id, None)

    def add(self, row: int, request_id: str, tokens: Sequence[int], num_prompt: int) -> None:
        self._rows[row] = ProcessedRow(request_id, list(tokens), num_prompt)

    def remove(self, row: int) -> None:
        self._rows.pop(row, None)

    def among(self, rows: Sequence[int]) -> dict[int, ProcessedRow]:
        """Return those of `rows` that have callables, to append to once their tokens are known."""
        return {row: self._rows[row] for row in rows if row in self._rows}

    def apply(self, logits_RV: Tensor, rows: Sequence[int]) -> dict[int, str]:
        """Change the logits of the rows with callables in place; returns what went wrong, per row."""
        found = ((row, self._apply_row(logits_RV[i], self._rows[row])) for i, row in self._placed(rows))
        return {row: error for row, error in found if error is not None}

    def _placed(self, rows: Sequence[int]) -> list[tuple[int, int]]:
        return [(i, row) for i, row in enumerate(rows) if row in self._rows]

    def _apply_row(self, logits_V: Tensor, row: ProcessedRow) -> str | None:
        processors = self._processors.get(row.request_id)
        if processors is None:
            return "its logits processors are not in this process"
        try:
            for style, processor in processors:
                _call(style, processor, logits_V, row)
        except Exception as error:
            logger.warning("a logits processor of request %s failed", row.request_id, exc_info=True)
            return f"a logits processor raised {type(error).__name__}: {str(error)[:MAX_SHOWN]}"
        # Reads the device; nothing else is in flight here. NaN fails the comparison.
        if not bool(logits_V.max() < torch.inf):
            return "a logits processor left NaN or infinity among the logits; mask with -inf only"
        return None


def _call(style: ProcessorStyle, processor: LogitsProcessor, logits_V: Tensor, row: ProcessedRow) -> None:
    prompt, generated = row.tokens[: row.num_prompt], row.tokens[row.num_prompt :]
    if style == "in_place":
        stream = torch.cuda.current_stream().cuda_stream if logits_V.is_cuda else None
        processor(row.request_id, logits_V.view(1, 1, -1), [prompt + generated], stream, None)
        return
    returned: Any = (
        processor(generated, logits_V) if style == "generated" else processor(prompt, generated, logits_V)
    )
    if not isinstance(returned, Tensor) or returned.shape != logits_V.shape:
        what = tuple(returned.shape) if isinstance(returned, Tensor) else type(returned).__name__
        raise TypeError(f"it must return logits of shape {tuple(logits_V.shape)}, not {what}")
    if returned is not logits_V:
        logits_V.copy_(returned)
