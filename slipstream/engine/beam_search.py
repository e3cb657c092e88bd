"""Which hypotheses does a beam search keep? Scores and endings, over numbers alone.

All hypotheses that run have the same length. At each step the `width` likeliest continuations that do not
end go on; those among the `width` likeliest of all that do end are finished, and of the finished the `width`
best by score stay. Scores, and when no better one can come, are those of transformers' beam search (Wolf et
al., EMNLP 2020; length normalisation after Wu et al., arXiv:1609.08144, without its constant), whose ties are
in no stated order; here an earlier hypothesis and then a likelier token, or the lower id, comes first.
Invariant: what comes out depends on the candidates alone, never on how they were computed.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Collection, Sequence
from typing import Any

from slipstream.core.beam_params import BeamParams
from slipstream.core.plan import Candidates


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Hypothesis:
    """The start of an output: its last token, and what came before it.

    `total` is the sum of all its raw log-probabilities. `note` is what the caller attached to the step that
    the last token was chosen from, the same for all hypotheses with that parent.
    """

    token: int
    logprob: float
    rank: int
    total: float
    length: int
    parent: Hypothesis | None
    note: Any = None

    def path(self) -> list[Hypothesis]:
        """Return the hypotheses that end in each of its tokens, the first token first."""
        found: list[Hypothesis] = []
        last: Hypothesis | None = self
        while last is not None:
            found.append(last)
            last = last.parent
        return found[::-1]


class BeamSearch:
    """One search: `live` hypotheses, likeliest first, and `finished` ones, best score first."""

    def __init__(self, beams: BeamParams, *, max_tokens: int, stop_ids: Collection[int]) -> None:
        self.live: list[Hypothesis] = []
        self.finished: list[Hypothesis] = []
        self.num_steps = 0
        self.is_done = False
        self._beams = beams
        self._max_tokens = max_tokens
        self._stop_ids = stop_ids

    def score(self, hypothesis: Hypothesis) -> float:
        return hypothesis.total / hypothesis.length**self._beams.length_penalty

    def advance(self, candidates: Sequence[Candidates], notes: Sequence[Any]) -> list[int]:
        """Extend every live hypothesis (at first: the empty one); returns the parent of each new one.

        Both lists have one entry per live hypothesis, in their order.
        """
        parents: list[Hypothesis | None] = [*self.live] if self.num_steps else [None]
        assert len(parents) == len(candidates) == len(notes)
        self.num_steps += 1
        is_last = self.num_steps >= self._max_tokens
        width = self._beams.width
        found = sorted(
            (-logprob - (parent.total if parent else 0.0), place, choice)
            for place, (parent, listed) in enumerate(zip(parents, candidates, strict=True))
            for choice, logprob in enumerate(listed.logprobs)
            if logprob > -math.inf
        )
        live: list[Hypothesis] = []
        origins: list[int] = []
        for order, (loss, place, choice) in enumerate(found):
            listed = candidates[place]
            token = listed.token_ids[choice]
            ends = is_last or token in self._stop_ids
            if order >= width and (ends or len(live) == width):
                continue
            rank = listed.ranks[choice]
            extended = Hypothesis(
                token, listed.logprobs[choice], rank, -loss, self.num_steps, parents[place], notes[place]
            )
            if ends:
                self.finished.append(extended)
            else:
                live.append(extended)
                origins.append(place)
        self.live = live
        self.finished = sorted(self.finished, key=self.score, reverse=True)[:width]
        self.is_done = not live or not self._can_improve()
        return origins

    def _can_improve(self) -> bool:
        """Say whether a live hypothesis might still come among the finished, as `early_stopping` sees it."""
        if len(self.finished) < self._beams.width:
            return True
        early, penalty = self._beams.early_stopping, self._beams.length_penalty
        if early is True:
            return False
        # With a penalty above 0 a longer output counts for more: at its longest it would do best.
        length = self._max_tokens if early == "never" and penalty > 0.0 else self.num_steps
        return self.live[0].total / length**penalty > self.score(self.finished[-1])

    def best(self, count: int) -> list[Hypothesis]:
        """Return the best finished hypotheses, then the likeliest live ones, at most `count`."""
        return list(itertools.islice(itertools.chain(self.finished, self.live), count))
