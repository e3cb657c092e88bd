"""What do these rows need of this step? Worked out on the host once per set of rows, not once per step.

Invariant: a batch reads host knowledge only (parameters), never a token or a length; it is valid until a row
of the sampler is removed, or outgrows `min_tokens`. Index tensors are batch-local (0..R-1) unless
named `rows`. Shapes: R rows of the batch, N random rows (ordered by group), P rows with penalties, E sparse
edits, A rows with allowed ids, C rows of a search.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from slipstream.core.sampling_params import RowSampling
from slipstream.sampling import state
from slipstream.sampling.candidates import runs_kernels
from slipstream.sampling.filters import FilterParams
from slipstream.sampling.history import NgramRule, SequenceRule
from slipstream.sampling.philox import Philox
from slipstream.sampling.state import RowTable, to_device

GroupKind = Literal["full", "top_k", "top_p"]
MAX_NOISE_COLUMNS = 64
# Leading tokens that a row may want from inside a captured step.
MAX_TOP = 20


@dataclasses.dataclass(slots=True)
class Group:
    """Random rows that take the same path; `part` is their slice of the batch's N random rows."""

    kind: GroupKind
    part: slice
    index_N: Tensor
    params: FilterParams
    max_k: int
    has_min_p: bool
    is_whole_batch: bool


@dataclasses.dataclass(slots=True)
class Penalised:
    index_P: Tensor
    slots_P: Tensor
    repetition_P: Tensor
    presence_P: Tensor
    frequency_P: Tensor


@dataclasses.dataclass(slots=True)
class SparseEdits:
    """Places (row * V + id) of the flattened logits, each once, with a value or the batch row of each."""

    places_E: Tensor
    values_E: Tensor


@dataclasses.dataclass(slots=True)
class Allowed:
    """Rows of which only the places (row * V + id) of the flattened logits stay."""

    index_A: Tensor
    places_E: Tensor


def takes_the_greatest(sampling: RowSampling) -> bool:
    """Say whether a row takes the greatest logit and nothing else is wanted of it."""
    s = sampling
    return s.is_greedy and not s.has_penalties and s.logprobs < 0 and _has_no_lists(s)


def fits_a_step(sampling: RowSampling) -> bool:
    """Say whether `step_draws` serves a row: all but its numbers is known to every step that draws."""
    s = sampling
    return _has_no_lists(s) and (s.is_greedy or not s.top_k) and s.logprobs <= MAX_TOP


def _has_no_lists(sampling: RowSampling) -> bool:
    """Say whether a row has no rules of its own length, and is not of a search."""
    s = sampling
    lists = (s.logit_bias, s.allowed_ids, s.bad_ids, s.bad_sequences)
    return not (s.no_repeat_ngram_size or s.num_candidates or any(lists))


class Batch:
    """The rows of a step, sorted by what they ask for."""

    def __init__(
        self,
        rows: list[int],
        *,
        params: Mapping[int, RowSampling],
        pending: Mapping[int, int],
        table: RowTable,
        vocab_size: int,
        device: torch.device,
    ) -> None:
        asked = [params[row] for row in rows]
        self.rows = list(rows)
        self.rows_R = to_device(self.rows, torch.int64, device)
        self.ones_R = torch.ones_like(self.rows_R)
        self.pending = [row for row in rows if row in pending]
        self.num_top = {i: s.logprobs for i, s in enumerate(asked) if s.logprobs >= 0}
        self.wants_all_logprobs = bool(self.num_top) and len(self.num_top) == len(rows)
        # Where each row's logprobs stand among those of the rows that want some.
        self.place_of_logprobs = {i: place for place, i in enumerate(self.num_top)}
        # Whether no row is greedy.
        self.is_random = not any(s.is_greedy for s in asked)
        self.num_candidates = {i: s.num_candidates for i, s in enumerate(asked) if s.num_candidates}
        self._table = table
        self._device = device
        self.logprobs_L = self._index(list(self.num_top))
        self.searched_C = self._index(list(self.num_candidates))
        self.groups = self._grouped(asked)
        self.penalised = self._penalised([i for i, s in enumerate(asked) if s.has_penalties])
        bias = [(i * vocab_size + t, b) for i, s in enumerate(asked) for t, b in s.logit_bias]
        self.bias = self._edits(bias, torch.float32)
        early = [
            (i * vocab_size + t, i) for i, s in enumerate(asked) if rows[i] in pending for t in s.stop_ids
        ]
        self.early_stops = self._edits(early, torch.int64)
        self.allowed = self._allowed(asked, vocab_size)
        bad = [i * vocab_size + t for i, s in enumerate(asked) for t in s.bad_ids]
        self.bad_E = self._index(bad) if bad else None
        self.ngrams = self._ngrams(asked)
        self.sequences = self._sequences(asked, vocab_size)
        self.has_edits = bool(
            bias or early or self.penalised or self.allowed or bad or self.ngrams or self.sequences
        )
        self.has_sparse_edits_only = not (self.allowed or self.ngrams or self.sequences)
        self.has_masks = bool(early or bad) or not self.has_sparse_edits_only
        # Whether every row draws in the same way, and none from a list of the leading tokens.
        is_whole = len(self.groups) == 1 and self.groups[0].is_whole_batch
        self.can_draw_at_once = is_whole and self.groups[0].kind != "top_k" and not self.num_candidates
        self.is_plain_greedy = not (
            self.groups or self.has_edits or self.num_top or self.num_candidates or self.pending
        )
        self._noise: Tensor = torch.empty(0, 0)
        self._column = 0
        self._random_rows_N: Tensor | None = None

    def uniform(self, philox: Philox) -> Tensor:
        """Return this step's float64 noise [N] of the random rows, at the positions the device knows.

        Noise depends on nothing but (seed, sample, position), so it is made for several steps at once, twice
        as many each time: a step of an unchanged batch mostly reads a column. A GPU makes it in one kernel a
        step. Call once per step.
        """
        if runs_kernels(self.rows_R):
            return self._make_noise_by_kernel()
        if self._column == self._noise.shape[1]:
            width = min(MAX_NOISE_COLUMNS, max(1, 2 * self._noise.shape[1]))
            self._noise = self._make_noise(philox, width)
            self._column = 0
        column = self._noise[:, self._column]
        self._column += 1
        return column

    def forget_noise(self) -> None:
        """Let go of noise for steps to come: a row drew somewhere else and is further than these say."""
        self._noise, self._column = torch.empty(0, 0), 0

    def _make_noise_by_kernel(self) -> Tensor:
        from slipstream.kernels.gpu.noise import uniform

        if self._random_rows_N is None:
            self._random_rows_N = self._rows_in_order()
        return uniform(
            self._random_rows_N,
            self._table.ints,
            self._table.position,
            key_column=state.KEY_LOW,
            sample_column=state.SAMPLE_IDX,
        )

    def _rows_in_order(self) -> Tensor:
        """Return the engine's numbers of the random rows, by group."""
        return self.rows_R.index_select(0, torch.cat([g.index_N for g in self.groups]))

    def _make_noise(self, philox: Philox, width: int) -> Tensor:
        rows = self._rows_in_order()
        ints = self._table.ints.index_select(0, rows).repeat_interleave(width, dim=0)
        steps = torch.arange(width, device=self._device)
        position = self._table.position.index_select(0, rows)[:, None] + steps
        key = ints[:, state.KEY_LOW : state.KEY_HIGH + 1].T
        return philox.uniform(key, ints[:, state.SAMPLE_IDX], position.flatten()).view(-1, width)

    def _grouped(self, asked: list[RowSampling]) -> list[Group]:
        members: dict[GroupKind, list[int]] = {"full": [], "top_k": [], "top_p": []}
        for i, s in enumerate(asked):
            if not s.is_greedy:
                members["top_k" if s.top_k else "top_p" if s.top_p < 1.0 else "full"].append(i)
        groups: list[Group] = []
        start = 0
        for kind, places in members.items():
            if places:
                part = slice(start, start + len(places))
                groups.append(self._group(kind, part, places, asked))
                start = part.stop
        return groups

    def _group(self, kind: GroupKind, part: slice, places: list[int], asked: list[RowSampling]) -> Group:
        index = self._index(places)
        rows = self.rows_R.index_select(0, index)
        floats = self._table.floats.index_select(0, rows)
        params = FilterParams(
            temperature_N=floats[:, state.TEMPERATURE].to(torch.float32),
            top_p_N=floats[:, state.TOP_P],
            min_p_N=floats[:, state.MIN_P],
            top_k_N=self._table.ints.index_select(0, rows)[:, state.TOP_K],
        )
        return Group(
            kind=kind,
            part=part,
            index_N=index,
            params=params,
            max_k=max(asked[i].top_k for i in places),
            has_min_p=any(asked[i].min_p > 0.0 for i in places),
            is_whole_batch=len(places) == len(asked),
        )

    def _penalised(self, places: list[int]) -> Penalised | None:
        if not places:
            return None
        index = self._index(places)
        rows = self.rows_R.index_select(0, index)
        floats = self._table.floats.index_select(0, rows).to(torch.float32)
        return Penalised(
            index_P=index,
            slots_P=self._table.ints.index_select(0, rows)[:, state.SLOT],
            repetition_P=floats[:, state.REPETITION],
            presence_P=floats[:, state.PRESENCE],
            frequency_P=floats[:, state.FREQUENCY],
        )

    def _allowed(self, asked: list[RowSampling], vocab_size: int) -> Allowed | None:
        limited = [i for i, s in enumerate(asked) if s.allowed_ids]
        if not limited:
            return None
        places = [i * vocab_size + t for i in limited for t in asked[i].allowed_ids]
        return Allowed(self._index(limited), self._index(places))

    def _ngrams(self, asked: list[RowSampling]) -> list[NgramRule]:
        members: dict[int, list[int]] = {}
        for i, s in enumerate(asked):
            if s.no_repeat_ngram_size:
                members.setdefault(s.no_repeat_ngram_size, []).append(i)
        rules: list[NgramRule] = []
        for size, places in members.items():
            rows = [self.rows[i] for i in places]
            rules.append(NgramRule(size, self._index(places), self._index(rows), rows))
        return rules

    def _sequences(self, asked: list[RowSampling], vocab_size: int) -> SequenceRule | None:
        bad = [(i, ids) for i, s in enumerate(asked) for ids in s.bad_sequences]
        if not bad:
            return None
        longest = max(len(ids) for _, ids in bad) - 1
        padded = [token for _, ids in bad for token in (*ids[:-1], *[0] * (longest + 1 - len(ids)))]
        return SequenceRule(
            prefix_SM=self._index(padded).view(len(bad), longest),
            length_S=self._index([len(ids) - 1 for _, ids in bad]),
            rows_S=self._index([self.rows[i] for i, _ in bad]),
            places_S=self._index([i * vocab_size + ids[-1] for i, ids in bad]),
        )

    def _edits(
        self, edits: list[tuple[int, float]] | list[tuple[int, int]], dtype: torch.dtype
    ) -> SparseEdits | None:
        if not edits:
            return None
        places = to_device([place for place, _ in edits], torch.int64, self._device)
        return SparseEdits(places, to_device([value for _, value in edits], dtype, self._device))

    def _index(self, places: list[int]) -> Tensor:
        return to_device(places, torch.int64, self._device)
