"""How many prompt tokens may join a step, so that those who read an answer do not stall?

A step that also runs prompts may take `max_decode_stretch` times as long as the decoding rows alone would.
Where more prompts wait than rows decode, the stretch grows with their ratio: then keeping few readers fluent
would make many wait. Costs are learnt from steps that have ended, so that a chunk is as long as this device
affords at this context, after Sarathi-Serve (arXiv:2403.02310, section 4.3), which fixes it beforehand.
Where some numbers of tokens run without padding (captured steps), the largest of these that is affordable is
allowed. Invariant: at least `min_chunk` tokens are allowed, so that every prompt advances.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence

# Weight of the newest step in a mean.
NEWEST = 0.5
# A chunk is at most so many times as long as one whose cost is known: as long as a step waits for weights
# anyway, tokens seem to cost nothing.
MAX_GROWTH = 1.5


class Pacing:
    """Learns from steps (`observe`) and bounds the next one (`budget`). Times are seconds."""

    def __init__(self, *, max_decode_stretch: float, min_chunk: int, even_chunks: Sequence[int] = ()) -> None:
        self._stretch = max_decode_stretch
        self._min_chunk = min_chunk
        # Ascending numbers of tokens that run without padding.
        self._even_chunks = list(even_chunks)
        # Of steps that only decode, by the bit length of their number of rows.
        self._decode_s: dict[int, float] = {}
        # Of a prompt token beside decoding rows, at about the size of the last chunks.
        self._token_s: float | None = None
        self._last_budget = min_chunk
        # The last chunk that was about as long as it might have been, what it cost, and what each token cost
        # that it had more than the one before.
        self._known_chunk, self._known_s, self._more_s = min_chunk, 0.0, 0.0

    def observe(self, *, num_decodes: int, num_prefill_tokens: int, seconds: float) -> None:
        """Take in how long a step took."""
        if not num_prefill_tokens:
            size = num_decodes.bit_length()
            self._decode_s[size] = _mean(self._decode_s.get(size), seconds, NEWEST)
            return
        decode_s = self._decode_time(num_decodes) or 0.0
        token_s = max(seconds - decode_s, 0.0) / num_prefill_tokens
        # What has become dearer keeps readers waiting, so it counts at once. A short chunk is nearly all
        # overhead: it says little about the next long one.
        newest = NEWEST if self._token_s is not None and token_s < self._token_s else 1.0
        weight = newest * min(1.0, num_prefill_tokens / self._last_budget)
        self._token_s = _mean(self._token_s, token_s, weight)
        if MAX_GROWTH * num_prefill_tokens >= self._last_budget:
            self._know(num_prefill_tokens, max(seconds - decode_s, 0.0))

    def _know(self, chunk: int, seconds: float) -> None:
        more = chunk - self._known_chunk
        if more > 0:
            self._more_s = max(0.0, seconds - self._known_s) / more
        self._known_chunk, self._known_s = chunk, seconds

    def budget(self, *, num_decodes: int, num_prompts: int) -> int | None:
        """Return how many prompt tokens a step may run beside `num_decodes` rows, None for any number.

        `num_prompts` are begun or waiting.
        """
        decode_s = self._decode_time(num_decodes)
        if decode_s is None:
            return None
        if self._token_s is None:
            return self._min_chunk
        stretch = self._stretch * max(1.0, num_prompts / num_decodes)
        spare_s = (stretch - 1.0) * decode_s
        self._last_budget = max(self._even(self._affordable(spare_s, self._token_s)), self._min_chunk)
        return self._last_budget

    def _affordable(self, spare_s: float, token_s: float) -> int:
        """Return how many tokens fit; more than are known to fit only if each more cost what the last did."""
        known = self._known_chunk
        place = bisect.bisect_right(self._even_chunks, known)
        longest = max(int(MAX_GROWTH * known), *self._even_chunks[place : place + 1], self._min_chunk)
        if self._more_s > 0.0 and spare_s > self._known_s:
            longest = min(longest, known + int((spare_s - self._known_s) / self._more_s))
        return longest if token_s * longest <= spare_s else int(spare_s / token_s)

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


def _mean(old: float | None, new: float, weight: float) -> float:
    return new if old is None else old + weight * (new - old)
