"""How many prompt tokens may join a step, so that those who read an answer do not stall?

A step that also runs prompts may take `max_decode_stretch` times as long as the decoding rows alone would.
Where more prompts wait than rows decode, the stretch grows with their ratio: then keeping few readers fluent
would make many wait. Costs are learnt from steps that have ended, so that a chunk is as long as this device
affords at this context, after Sarathi-Serve (arXiv:2403.02310, section 4.3), which fixes it beforehand.
What a chunk costs is taken for a line near the last ones: a part that any chunk costs, such as reading the
keys before it, and so much for each token more. The slope is learnt where a chunk is longer or shorter than
the one before, and forgotten slowly, so that a longer chunk is tried again.
Where some numbers of tokens run without padding (captured steps), the largest of these that is affordable is
allowed. Invariant: at least `min_chunk` tokens are allowed, so that every prompt advances.
"""

from __future__ import annotations

import bisect
import statistics
from collections import deque
from collections.abc import Sequence

# Weight of the newest in a mean.
NEWEST = 0.5
# A chunk is at most so many times as long as one whose cost is known: as long as a step waits for weights
# anyway, tokens seem to cost nothing. More where many wait for few, who are not to be kept fluent.
MAX_GROWTH, BURST_GROWTH = 1.5, 8.0
# A slope is left of a slope that no other chunk confirms, step by step.
KEPT_SLOPE = 0.97
# Chunks of one length whose median is their cost: one that took long for another reason is not.
RECENT = 3


class Pacing:
    """Learns from steps (`observe`) and bounds the next one (`budget`). Times are seconds."""

    def __init__(self, *, max_decode_stretch: float, min_chunk: int, even_chunks: Sequence[int] = ()) -> None:
        self._stretch = max_decode_stretch
        self._min_chunk = min_chunk
        # Ascending numbers of tokens that run without padding.
        self._even_chunks = list(even_chunks)
        # Of steps that only decode, by the bit length of their number of rows.
        self._decode_s: dict[int, float] = {}
        self._last_budget = min_chunk
        # The length of the last chunk that was about as long as it might have been, and what such ones took
        # beyond decoding; what a token more takes: all that tokens took, until two lengths are known.
        self._chunk = 0
        self._chunk_s: deque[float] = deque(maxlen=RECENT)
        self._slope_s = 0.0
        self._knows_slope = False

    def observe(self, *, num_decodes: int, num_prefill_tokens: int, seconds: float) -> None:
        """Take in how long a step took."""
        if not num_prefill_tokens:
            size = num_decodes.bit_length()
            known = self._decode_s.get(size)
            self._decode_s[size] = seconds if known is None else known + NEWEST * (seconds - known)
            return
        # A short chunk is nearly all overhead: it says little about the next long one.
        if self._chunk and MAX_GROWTH * num_prefill_tokens < self._last_budget:
            return
        more_s = max(seconds - (self._decode_time(num_decodes) or 0.0), 0.0)
        if num_prefill_tokens != self._chunk:
            self._learn_slope(num_prefill_tokens, more_s)
            self._chunk = num_prefill_tokens
            self._chunk_s.clear()
        else:
            self._slope_s *= KEPT_SLOPE
        self._chunk_s.append(more_s)

    def _learn_slope(self, chunk: int, more_s: float) -> None:
        if not self._chunk:
            self._slope_s = more_s / chunk
            return
        slope_s = (more_s - statistics.median(self._chunk_s)) / (chunk - self._chunk)
        if slope_s > 0.0:
            weight = NEWEST if self._knows_slope else 1.0
            self._slope_s += weight * (slope_s - self._slope_s)
            self._knows_slope = True

    def budget(self, *, num_decodes: int, num_prompts: int) -> int | None:
        """Return how many prompt tokens a step may run beside `num_decodes` rows, None for any number.

        `num_prompts` are begun or waiting.
        """
        decode_s = self._decode_time(num_decodes)
        if decode_s is None:
            return None
        if not self._chunk:
            return self._min_chunk
        crowd = max(1.0, num_prompts / num_decodes)
        spare_s = (self._stretch * crowd - 1.0) * decode_s
        tokens = self._affordable(spare_s, MAX_GROWTH if crowd == 1.0 else BURST_GROWTH)
        self._last_budget = max(self._even(tokens), self._min_chunk)
        return self._last_budget

    def _affordable(self, spare_s: float, growth: float) -> int:
        """Return how many tokens fit by the line through what is known."""
        chunk, chunk_s = self._chunk, statistics.median(self._chunk_s)
        # A token more costs no more than one did on average: what any chunk costs is never below 0.
        slope_s = min(self._slope_s, chunk_s / chunk)
        place = bisect.bisect_right(self._even_chunks, chunk)
        longest = max(int(growth * chunk), *self._even_chunks[place : place + 1], self._min_chunk)
        if slope_s <= 0.0:
            return longest if spare_s >= chunk_s else self._min_chunk
        return min(longest, chunk + int((spare_s - chunk_s) / slope_s))

    def _even(self, tokens: int) -> int:
        """Return the largest number that runs without padding; beyond them all steps are not padded."""
        place = bisect.bisect_right(self._even_chunks, tokens)
        return tokens if place in (0, len(self._even_chunks)) else self._even_chunks[place - 1]

    def _decode_time(self, num_decodes: int) -> float | None:
        """Return the time of a step of about so many rows; of the nearest size where none of it was seen."""
        if not num_decodes or not self._decode_s:
            return None
        size = num_decodes.bit_length()
        return self._decode_s[min(self._decode_s, key=lambda known: abs(known - size))]
