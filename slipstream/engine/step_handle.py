# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""What is known of a launched step, and what did it bring? The runner fills a record in; reading it waits.

Tokens come in two ways: chosen inside a captured step, or drawn outside from the logits of the rows left
open. Invariant: `read_step` waits for the copies of its own step alone, and a failing row is an entry of the
result.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from torch import Tensor

from slipstream.core.plan import StepPlan, StepResult
from slipstream.engine.wanted_logits import Wanted, read_all
from slipstream.sampling.base import HostCopy, SampleOutput, unpack_wide_logprobs
from slipstream.sampling.processors import ProcessedRow

STATUS_MESSAGES = {
    1: "the model produced logits that are not finite (NaN or infinity) for this request",
    2: "every token is masked for this request: no token is allowed next",
}


@dataclasses.dataclass(slots=True)
class Drawn:
    """What a captured step chose and judged, on its way to the host: ids, statuses, whether finite.

    `lines` are those of `rows`, which got their token inside; `quiet` are rows that were not sampled.
    `logprobs` are those of rows in `num_top`, which says of how many leading tokens, line by line.
    """

    copy: HostCopy
    rows: list[int]
    lines: list[int]
    quiet: list[tuple[int, int]]
    logprobs: HostCopy | None = None
    num_top: dict[int, int] = dataclasses.field(default_factory=dict[int, int])


@dataclasses.dataclass(slots=True)
class StepHandle:
    """One launched step. `logits_RV` are of `open_rows`, the sampled rows whose token is yet to be chosen.

    `is_finite` says of `quiet_rows`, whose spans are not sampled, whether their last hidden state is
    finite: a bad chunk must be known before its pages are reused; of a captured step `drawn` says it.
    `processed` are the sampled rows with callables (their numbers may be another request's by the time of
    `collect`).
    """

    plan: StepPlan
    logits_RV: Tensor | None = None
    open_rows: list[int] = dataclasses.field(default_factory=list[int])
    drawn: Drawn | None = None
    quiet_rows: list[int] = dataclasses.field(default_factory=list[int])
    is_finite: HostCopy | None = None
    wanted: list[Wanted] = dataclasses.field(default_factory=list[Wanted])
    processed: dict[int, ProcessedRow] = dataclasses.field(default_factory=dict[int, ProcessedRow])
    processor_errors: dict[int, str] = dataclasses.field(default_factory=dict[int, str])
    sampled: SampleOutput | None = None
    error: str | None = None


def read_step(handle: StepHandle) -> StepResult:
    """Wait for a step and return what it brought, in host numbers."""
    plan = handle.plan
    if handle.error is not None:
        rows = [span.row for span in plan.spans]
        return StepResult(plan.step_id, row_errors=dict.fromkeys(rows, handle.error))
    result = StepResult(plan.step_id, executed_tokens=plan.num_tokens)
    if handle.is_finite is not None:
        finite = zip(handle.quiet_rows, handle.is_finite.numbers(), strict=True)
        result.row_errors = {row: STATUS_MESSAGES[1] for row, is_finite in finite if not is_finite}
    if handle.wanted:
        result.extras = dict(read_all(handle.wanted))
    if handle.drawn is not None:
        _read_drawn(handle.drawn, result)
    if handle.sampled is not None:
        _note_tokens(result, handle.open_rows, handle.sampled.tokens(), handle.sampled.statuses())
        _read_sampled(handle, handle.sampled, result)
    return result


def _read_sampled(handle: StepHandle, sampled: SampleOutput, result: StepResult) -> None:
    """Add what else came with the tokens that were drawn outside, and tell callables of theirs."""
    rows = handle.open_rows
    for row, message in handle.processor_errors.items():
        result.tokens[row] = []
        result.row_errors[row] = message
        result.error_codes[row] = "processing_error"
    for row, processed in handle.processed.items():
        processed.tokens += result.tokens[row]
    result.logprobs |= {rows[idx]: [found] for idx, found in sampled.logprobs_by_row().items()}
    continuations = sampled.continuations_by_row()
    result.candidates = {rows[idx]: found for idx, found in continuations.items()}


def _note_tokens(
    result: StepResult, rows: Sequence[int], ids: Sequence[int], statuses: Sequence[int]
) -> None:
    """Add the token of each row, or why it has none."""
    result.tokens |= {row: [token] for row, token in zip(rows, ids, strict=True)}
    if any(statuses):
        for row, status in zip(rows, statuses, strict=True):
            if status:
                result.tokens[row] = []
                result.row_errors[row] = STATUS_MESSAGES[status]


def _read_drawn(drawn: Drawn, result: StepResult) -> None:
    """Wait for what a captured step chose, and add it."""
    parts = drawn.copy.numbers()
    ids, statuses = ([part[line] for line in drawn.lines] for part in parts[:2])
    _note_tokens(result, drawn.rows, ids, statuses)
    if drawn.logprobs is not None:
        line_of = dict(zip(drawn.rows, drawn.lines, strict=True))
        places = [line_of[row] for row in drawn.num_top]
        found = unpack_wide_logprobs(drawn.logprobs.array()[places], list(drawn.num_top.values()))
        result.logprobs |= {
            row: [one] for row, one in zip(drawn.num_top, found, strict=True) if one is not None
        }
    for row, line in drawn.quiet:
        if not parts[2][line]:
            result.row_errors[row] = STATUS_MESSAGES[1]
