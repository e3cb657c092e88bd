"""Which token does each row get? `Sampler`: one vectorised pass over the logits of a mixed batch.

Order: raw log-softmax for logprobs; what the caller does to the logits itself; logit bias; repetition,
presence and frequency penalties; masks (the stop ids of rows below `min_tokens`, tokens not allowed or bad,
repeated n-grams, the caller's mask); then a greedy row takes the largest logit and a random row goes through
temperature, top-k, top-p, min-p and the draw (`filters.py`). transformers has the same order except that its
custom processors come last; vLLM has minimum length and bias before the penalties, and min-p before top-k
and top-p.

Invariant: `sample` needs no token, length or count from the host and never waits for the device, so a step
may be launched before the last one is known; a row's result does not depend on its neighbours.
Shapes: R rows of the step, V vocabulary, N, P, L, C rows of it that are random, penalised, want logprobs,
belong to a search.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from slipstream.core.sampling_params import RowSampling
from slipstream.sampling.base import (
    OK,
    PackedContinuations,
    PackedLogprobs,
    SampleOutput,
)
from slipstream.sampling.batch import Batch, Group, fits_a_step, takes_the_greatest
from slipstream.sampling.candidates import greatest, has_kernels, runs_kernels
from slipstream.sampling.continuations import pack_continuations
from slipstream.sampling.filters import (
    draw_full,
    draw_top_k,
    draw_top_p,
    judge_and_draw,
)
from slipstream.sampling.greedy import draw_greatest, status_of
from slipstream.sampling.history import TokenHistory, mask_completions, mask_repeats
from slipstream.sampling.logprobs import Leaders, pack_logprobs
from slipstream.sampling.penalties import PenaltyTables, put_back
from slipstream.sampling.philox import Philox
from slipstream.sampling.state import NO_SLOT, RowTable
from slipstream.sampling.step_draws import StepDraws

Undo = Callable[[], None]


@dataclasses.dataclass(slots=True)
class Choice:
    """Token ids and statuses of a batch, and what takes its sparse edits back, to be called in reverse."""

    token_ids: Tensor
    status: Tensor
    undo: list[Undo]
    continuations: PackedContinuations | None = None


class Sampler:
    """Sampling state of the engine's rows on one device.

    Calls are made from one thread, in stream order. `add` and `remove` are invariants of the scheduler (a row
    is free when added), hence asserts. `history` is the caller's token buffer; rules on what came before need
    it, and the caller appends each sampled token to it before the next step.
    """

    def __init__(
        self,
        *,
        max_rows: int,
        vocab_size: int,
        device: torch.device | str,
        history: TokenHistory | None = None,
    ) -> None:
        self._device = torch.device(device)
        self._max_rows = max_rows
        self._vocab_size = vocab_size
        self._philox = Philox(self._device)
        self._table = RowTable(max_rows=max_rows, device=self._device)
        self._tables = PenaltyTables(max_rows=max_rows, vocab_size=vocab_size, device=self._device)
        self._history = history
        # The most tokens that a row with rules on its history can have.
        self._widths: dict[int, int] = {}
        self._params: dict[int, RowSampling] = {}
        self._slots: dict[int, int] = {}
        # Calls of `sample` until a row has certainly passed its min_tokens.
        self._pending: dict[int, int] = {}
        self._takes_greatest: dict[int, bool] = {}
        self._fits_a_step: dict[int, bool] = {}
        self._version = 0
        self._batch: Batch | None = None

    def add(
        self, row: int, sampling: RowSampling, tokens: list[int], num_prompt: int, seed: int, sample_idx: int
    ) -> None:
        """Admit a request to `row`. Tokens beyond `num_prompt` are outputs of an earlier stay and count."""
        assert 0 <= row < self._max_rows and row not in self._params, f"row {row} is not free"
        num_outputs = len(tokens) - num_prompt
        slot = NO_SLOT
        if sampling.has_penalties:
            slot = self._slots[row] = self._tables.claim(tokens, num_prompt)
        if sampling.reads_history:
            assert self._history is not None, "a row reads its history and there is none"
            self._widths[row] = len(tokens)
        if sampling.min_tokens > num_outputs:
            self._pending[row] = sampling.min_tokens - num_outputs
        self._table.write(row, sampling, seed=seed, sample_idx=sample_idx, position=num_outputs, slot=slot)
        self._params[row] = sampling
        self._takes_greatest[row] = takes_the_greatest(sampling)
        self._fits_a_step[row] = fits_a_step(sampling)
        self._version += 1

    def remove(self, row: int) -> None:
        """Forget a row; it may be added again at once."""
        del self._params[row]
        self._pending.pop(row, None)
        self._widths.pop(row, None)
        if row in self._slots:
            self._tables.release(self._slots.pop(row))
        self._batch = None
        self._version += 1

    def sample(
        self,
        logits_RV: Tensor,
        rows: list[int],
        masks: Tensor | None = None,
        *,
        edit: Callable[[Tensor], None] | None = None,
    ) -> SampleOutput:
        """Draw one token per row and count it.

        `logits_RV` is float32 [R, V] on the sampler's device, line i for `rows[i]` (distinct), and may be
        overwritten; `masks` is bool [R, V], true where a token is allowed. `edit` changes the logits in place
        before anything else does. Never synchronises.
        """
        assert logits_RV.dtype == torch.float32 and logits_RV.shape == (len(rows), self._vocab_size)
        batch = self._batch_of(rows)
        has_edits = batch.has_edits or masks is not None or edit is not None
        if batch.is_plain_greedy and not has_edits:
            # Lengths stay as they are: no row here reads its own.
            return draw_greatest(logits_RV)
        logits_RV = logits_RV.contiguous()
        is_edited_outside = masks is not None or edit is not None
        # Sparse edits are taken back, so that nobody has to copy the vocabulary.
        is_undone = batch.wants_all_logprobs and batch.has_sparse_edits_only and not is_edited_outside
        leaders = self._leaders(logits_RV, batch)
        raw_LV = self._raw(logits_RV, batch, is_overwritten=has_edits and not is_undone)
        if batch.can_draw_at_once and runs_kernels(logits_RV):
            choice = self._choose_at_once(logits_RV, batch, leaders, masks, edit)
        else:
            choice = self._choose(logits_RV, batch, leaders, masks, edit)
        if is_undone:
            for take_back in reversed(choice.undo):
                take_back()
        token_ids, status = choice.token_ids, choice.status
        self._count(batch, token_ids)
        packed = _packed(raw_LV, batch, token_ids, status, leaders)
        return SampleOutput(token_ids, status, packed, choice.continuations)

    def _choose_at_once(
        self,
        logits_RV: Tensor,
        batch: Batch,
        leaders: Leaders | None,
        masks: Tensor | None,
        edit: Callable[[Tensor], None] | None,
    ) -> Choice:
        """Draw where one kernel judges every row's logits and draws its token.

        Biases and penalties leave NaN and infinity what they are; what may hide one is looked behind first.
        """
        raw_status = None
        if batch.has_masks or masks is not None or edit is not None:
            first = leaders or Leaders.of(logits_RV, 1)
            raw_status = status_of(first.first()[0])
        if edit is not None:
            edit(logits_RV)
        undo = self._edit(logits_RV, batch) + self._mask(logits_RV, batch, masks)
        (group,), noise = batch.groups, batch.uniform(self._philox)
        has_top_p = group.kind == "top_p"
        token_ids, status = judge_and_draw(
            logits_RV, noise, group.params, has_top_p=has_top_p, has_min_p=group.has_min_p
        )
        if raw_status is not None:
            status = torch.where(raw_status != OK, raw_status, status)
            token_ids = token_ids.masked_fill(status != OK, 0)
        return Choice(token_ids, status, undo)

    def _choose(
        self,
        logits_RV: Tensor,
        batch: Batch,
        leaders: Leaders | None,
        masks: Tensor | None,
        edit: Callable[[Tensor], None] | None,
    ) -> Choice:
        """Judge the logits, change them, judge them again, and draw group by group."""
        raw_max, token_ids = greatest(logits_RV) if leaders is None else leaders.first()
        searched_CV = logits_RV.index_select(0, batch.searched_C) if batch.num_candidates else None
        status = status_of(raw_max)
        if edit is not None:
            edit(logits_RV)
        undo: list[Undo] = []
        if batch.has_edits or masks is not None or edit is not None:
            undo = self._edit(logits_RV, batch) + self._mask(logits_RV, batch, masks)
            edited_max, token_ids = greatest(logits_RV)
            status = torch.where(status != OK, status, status_of(edited_max))
        continuations = _continuations(searched_CV, logits_RV, batch)
        if batch.groups:
            noise = batch.uniform(self._philox)
            for group in batch.groups:
                drawn = _draw(logits_RV, noise[group.part], group)
                token_ids = drawn if group.is_whole_batch else token_ids.index_copy(0, group.index_N, drawn)
        return Choice(token_ids.masked_fill(status != OK, 0), status, undo, continuations)

    def is_plain_greedy(self, row: int) -> bool:
        """Say whether a row takes the largest logit and nothing else, so that others may do it for us."""
        return row not in self._pending and self._takes_greatest[row]

    def fits_a_step(self, row: int) -> bool:
        """Say whether `step_draws` may choose a row's token for us, with all that goes with it."""
        return row not in self._pending and self._fits_a_step[row]

    def is_greedy(self, row: int) -> bool:
        """Say whether a row takes the largest of its logits, once they are changed as it asks."""
        return self._params[row].is_greedy

    def num_top(self, row: int) -> int:
        """Return how many leading tokens a row wants logprobs of beside its own; -1 for none at all."""
        return self._params[row].logprobs

    @property
    def version(self) -> int:
        """Return a number that stays the same while no row's answer of `is_plain_greedy` or `fits_a_step`
        can have changed."""
        return self._version

    def step_draws(self) -> StepDraws:
        """Return what draws for rows of this sampler inside a captured step."""
        return StepDraws(self._table, self._tables, vocab_size=self._vocab_size, device=self._device)

    def note_draws_elsewhere(self) -> None:
        """Take note that `step_draws` drew for some rows: their positions are further than we last saw."""
        if self._batch is not None:
            self._batch.forget_noise()

    def _batch_of(self, rows: list[int]) -> Batch:
        if self._batch is None or self._batch.rows != rows:
            self._batch = Batch(
                rows,
                params=self._params,
                pending=self._pending,
                table=self._table,
                vocab_size=self._vocab_size,
                device=self._device,
            )
        return self._batch

    def _leaders(self, logits_RV: Tensor, batch: Batch) -> Leaders | None:
        """Return the leaders that every row wants, the greatest first, where a kernel finds them."""
        num_top = max(batch.num_top.values(), default=0)
        if not num_top or not batch.wants_all_logprobs or not has_kernels(logits_RV, num_top):
            return None
        # A greedy row takes the lowest id of zeros of either sign, which the leaders tell apart.
        return Leaders.of(logits_RV, num_top) if batch.has_edits or batch.is_random else None

    def _raw(self, logits_RV: Tensor, batch: Batch, *, is_overwritten: bool) -> Tensor | None:
        """Return the logits of rows that want logprobs, safe from the edits to come."""
        if not batch.num_top:
            return None
        if batch.wants_all_logprobs and not is_overwritten:
            return logits_RV
        return logits_RV.index_select(0, batch.logprobs_L)

    def _edit(self, logits_RV: Tensor, batch: Batch) -> list[Undo]:
        """Add biases and penalties; returns what takes them back, to be called in reverse."""
        undo: list[Undo] = []
        flat = logits_RV.view(-1)
        if batch.bias is not None:
            places = batch.bias.places_E
            old = flat.index_select(0, places)
            flat.index_copy_(0, places, old + batch.bias.values_E)
            undo.append(functools.partial(put_back, logits_RV, places, old))
        if batch.penalised is not None:
            p = batch.penalised
            undo.append(
                self._tables.penalise(
                    logits_RV,
                    p.index_P,
                    p.slots_P,
                    repetition_P=p.repetition_P,
                    presence_P=p.presence_P,
                    frequency_P=p.frequency_P,
                )
            )
        return undo

    def _mask(self, logits_RV: Tensor, batch: Batch, masks: Tensor | None) -> list[Undo]:
        """Put what is not allowed at -inf; masks only remove, so their order does not matter.

        Returns what takes the sparse ones back, to be called in reverse.
        """
        undo: list[Undo] = []
        flat = logits_RV.view(-1)
        if batch.early_stops is not None:
            places, owners = batch.early_stops.places_E, batch.early_stops.values_E
            is_early = self._table.is_early(batch.rows_R).index_select(0, owners)
            old = flat.index_select(0, places)
            flat.index_copy_(0, places, old.masked_fill(is_early, -torch.inf))
            undo.append(functools.partial(put_back, logits_RV, places, old))
        if batch.allowed is not None:
            kept = flat.index_select(0, batch.allowed.places_E)
            logits_RV.index_fill_(0, batch.allowed.index_A, -torch.inf)
            flat.index_copy_(0, batch.allowed.places_E, kept)
        if batch.bad_E is not None:
            undo.append(
                functools.partial(put_back, logits_RV, batch.bad_E, flat.index_select(0, batch.bad_E))
            )
            flat.index_fill_(0, batch.bad_E, -torch.inf)
        if self._history is not None:
            self._mask_by_history(logits_RV, batch, self._history)
        if masks is not None:
            logits_RV.masked_fill_(~masks, -torch.inf)
        return undo

    def _mask_by_history(self, logits_RV: Tensor, batch: Batch, history: TokenHistory) -> None:
        for rule in batch.ngrams:
            width = max(self._widths[row] for row in rule.rows)
            mask_repeats(logits_RV, history, rule, width=width)
        if batch.sequences is not None:
            num_outputs = self._table.position.index_select(0, batch.sequences.rows_S)
            mask_completions(logits_RV, history, batch.sequences, num_outputs_S=num_outputs)

    def _count(self, batch: Batch, token_ids: Tensor) -> None:
        self._table.advance(batch.rows_R, batch.ones_R)
        if batch.penalised is not None:
            p = batch.penalised
            self._tables.count(token_ids, p.index_P, p.slots_P)
        for rule in batch.ngrams:
            for row in rule.rows:
                self._widths[row] += 1
        for row in batch.pending:
            self._pending[row] -= 1
            if self._pending[row] == 0:
                del self._pending[row]
                self._batch = None
                self._version += 1


def _draw(logits_RV: Tensor, uniform_N: Tensor, group: Group) -> Tensor:
    x_NV = logits_RV if group.is_whole_batch else logits_RV.index_select(0, group.index_N)
    if group.kind == "full":
        return draw_full(x_NV, uniform_N, group.params, has_min_p=group.has_min_p)
    if group.kind == "top_k":
        return draw_top_k(x_NV, uniform_N, group.params, max_k=group.max_k)
    return draw_top_p(x_NV, uniform_N, group.params, has_min_p=group.has_min_p)


def _packed(
    raw_LV: Tensor | None, batch: Batch, token_ids: Tensor, status: Tensor, leaders: Leaders | None
) -> PackedLogprobs | None:
    if raw_LV is None:
        return None
    if not batch.wants_all_logprobs:
        token_ids, status = (column.index_select(0, batch.logprobs_L) for column in (token_ids, status))
    num_top = max(batch.num_top.values())
    packed = pack_logprobs(raw_LV, token_ids, status, num_top=num_top, leaders=leaders)
    return PackedLogprobs(packed, batch.place_of_logprobs, batch.num_top)


def _continuations(searched_CV: Tensor | None, logits_RV: Tensor, batch: Batch) -> PackedContinuations | None:
    """Pack how the rows of a search could go on, once their masks stand in `logits_RV`."""
    if searched_CV is None:
        return None
    packed = pack_continuations(
        searched_CV,
        logits_RV.index_select(0, batch.searched_C),
        count=max(batch.num_candidates.values()),
        with_ranks=any(i in batch.num_top for i in batch.num_candidates),
    )
    place = {i: place for place, i in enumerate(batch.num_candidates)}
    return PackedContinuations(packed, place, batch.num_candidates)
