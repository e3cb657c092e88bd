"""How do tokens already seen change the next ones? Per-row counts on the device, and the three penalties.

Repetition (over prompt and output): positive logits are divided, others multiplied, by the penalty; Keskar et
al., "CTRL", arXiv 1909.05858, section 4.1, with the sign rule that transformers and vLLM share. Presence and
frequency (over the output only): p if the token occurred, plus f per occurrence, are subtracted, as in
OpenAI's API reference. Repetition comes first, as in vLLM.

Invariants: only rows with a penalty own a slot, so a batch without penalties allocates nothing; slots double
up to `max_rows`. A step reads the tokens a row has seen, not its vocabulary: the cost grows with the text. A
seen list may name a token twice; each entry computes the same value from the same old one, so the order of
writes does not matter. Shapes: P rows with penalties, V vocabulary, S slots, W entries of the seen lists.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from slipstream.kernels.registration import has_triton
from slipstream.sampling.state import to_device

FIRST_SLOTS = 4
FIRST_WIDTH = 256


class PenaltyTables:
    """Output counts [S, V] int32, seen tokens [S, W] int64 and the length of each seen list [S].

    Entries of a list beyond its length repeat its first token. Slots claimed are written together, before
    anybody reads.
    """

    def __init__(self, *, max_rows: int, vocab_size: int, device: torch.device) -> None:
        self._max_rows = max_rows
        self._vocab_size = vocab_size
        self._device = device
        self._has_kernels = device.type == "cuda" and has_triton()
        self._free: list[int] = []
        self._counts_SV = torch.zeros(0, vocab_size, dtype=torch.int32, device=device)
        self._seen_SW = torch.zeros(0, FIRST_WIDTH, dtype=torch.int64, device=device)
        self._length_S = torch.zeros(0, dtype=torch.int64, device=device)
        # A slot claimed with n tokens at step s holds at most n + (now - s): the host keeps n - s.
        self._steps = 0
        self._offsets: dict[int, int] = {}
        # Where the tables stand, for kernels of captured steps: addresses of counts, seen tokens, lengths and
        # room to save logits in, then the width W.
        self.places = torch.zeros(5, dtype=torch.int64, device=device)
        self._last_places: list[int] = []
        self._saved_SW = torch.empty(0, FIRST_WIDTH, device=device)
        # Slots not written yet: the tokens they have seen, each once, and the outputs to count.
        self._claimed: dict[int, tuple[list[int], list[int]]] = {}

    @property
    def num_slots(self) -> int:
        return self._counts_SV.shape[0]

    def claim(self, tokens: list[int], num_prompt: int) -> int:
        """Return a slot that has seen `tokens` and counts those beyond `num_prompt`."""
        if not self._free:
            self._grow_slots()
        slot = self._free.pop()
        seen = list(dict.fromkeys(tokens))
        self._offsets[slot] = len(seen) - self._steps
        self._claimed[slot] = (seen, tokens[num_prompt:])
        return slot

    def release(self, slot: int) -> None:
        del self._offsets[slot]
        self._claimed.pop(slot, None)
        self._free.append(slot)

    def _flush(self) -> None:
        """Write what was claimed since the last step, all of it in one copy."""
        self._fit_width()
        if not self._claimed:
            return
        width, vocab_size = self._seen_SW.shape[1], self._vocab_size
        lists = list(self._claimed.items())
        parts = [
            [slot for slot, _ in lists],
            [seen[0] for _, (seen, _) in lists],
            [len(seen) for _, (seen, _) in lists],
            [place for slot, (seen, _) in lists for place in range(slot * width, slot * width + len(seen))],
            [token for _, (seen, _) in lists for token in seen],
            [slot * vocab_size + token for slot, (_, outputs) in lists for token in outputs],
        ]
        self._claimed = {}
        packed = to_device([value for part in parts for value in part], torch.int64, self._device)
        slots, first, length, places, tokens, outputs = torch.split(packed, [len(part) for part in parts])
        self._seen_SW.index_copy_(0, slots, first[:, None].expand(-1, width))
        self._seen_SW.view(-1).index_copy_(0, places, tokens)
        self._length_S.index_copy_(0, slots, length)
        self._counts_SV.index_fill_(0, slots, 0)
        ones = torch.ones_like(outputs, dtype=torch.int32)
        self._counts_SV.view(-1).index_add_(0, outputs, ones)

    def prepare_step(self) -> None:
        """Make room for one more token in every slot, before a captured step that may count some is replayed.

        The tables may move; a replay finds them by `places`.
        """
        if not self._offsets:
            return
        self._steps += 1
        self._flush()
        if not self._has_kernels:
            return
        if self._saved_SW.shape != self._seen_SW.shape:
            self._saved_SW = torch.empty(self._seen_SW.shape, device=self._device)
        tables = (self._counts_SV, self._seen_SW, self._length_S, self._saved_SW)
        places = [*(table.data_ptr() for table in tables), self._seen_SW.shape[1]]
        if places != self._last_places:
            self.places.copy_(to_device(places, torch.int64, self._device))
            self._last_places = places

    def count(self, token_ids_R: Tensor, index_P: Tensor, slots_P: Tensor) -> None:
        """Add one output token, that of row `index_P`, to each of distinct slots."""
        self._steps += 1
        self._flush()
        if not self._has_kernels:
            self.count_by_tensors(slots_P, token_ids_R.index_select(0, index_P))
            return
        from slipstream.kernels.gpu.penalties import count

        count(token_ids_R, index_P, slots_P, (self._counts_SV, self._seen_SW, self._length_S))

    def count_by_tensors(self, slots_P: Tensor, token_ids_P: Tensor) -> None:
        """Do what `count` does to the tables, by tensor operations: the definition."""
        ones = torch.ones_like(slots_P, dtype=torch.int32)
        self._counts_SV.view(-1).index_add_(0, slots_P * self._vocab_size + token_ids_P, ones)
        length_P = self._length_S.index_select(0, slots_P)
        places_P = slots_P * self._seen_SW.shape[1] + length_P
        self._seen_SW.view(-1).index_copy_(0, places_P, token_ids_P)
        self._length_S.index_copy_(0, slots_P, length_P + 1)

    def penalise(
        self,
        logits_RV: Tensor,
        index_P: Tensor,
        slots_P: Tensor,
        *,
        repetition_P: Tensor,
        presence_P: Tensor,
        frequency_P: Tensor,
    ) -> Callable[[], None]:
        """Change rows `index_P` of contiguous float32 logits in place; parameters are float32 [P].

        Returns what brings the logits back, to be called, if at all, before `count`.
        """
        self._flush()
        asked = (repetition_P, presence_P, frequency_P)
        if not self._has_kernels:
            places, old = self.penalise_by_tensors(logits_RV, index_P, slots_P, *asked)
            return lambda: put_back(logits_RV, places, old)
        from slipstream.kernels.gpu.penalties import penalise, restore

        counts, seen, length = self._counts_SV, self._seen_SW, self._length_S
        longest = self.longest()
        saved = penalise(logits_RV, index_P, slots_P, (counts, seen, length), asked, longest=longest)
        return lambda: restore(logits_RV, index_P, slots_P, seen, length, saved)

    def penalise_by_tensors(
        self,
        logits_RV: Tensor,
        index_P: Tensor,
        slots_P: Tensor,
        repetition_P: Tensor,
        presence_P: Tensor,
        frequency_P: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Do what `penalise` does, the definition; returns places (row * V + id) and what was there."""
        seen_PW = self._seen_SW[:, : self.longest()].index_select(0, slots_P)
        count_places = seen_PW + slots_P[:, None] * self._vocab_size
        counts = self._counts_SV.view(-1).take(count_places)
        flat = logits_RV.view(-1)
        places = seen_PW + index_P[:, None] * self._vocab_size
        old_PW = flat.take(places)
        repetition = repetition_P[:, None]
        x_PW = torch.where(old_PW > 0, old_PW / repetition, old_PW * repetition)
        x_PW.sub_(counts * frequency_P[:, None]).sub_((counts > 0) * presence_P[:, None])
        flat.index_copy_(0, places.view(-1), x_PW.view(-1))
        return places.view(-1), old_PW.view(-1)

    def longest(self) -> int:
        """Return a length that no seen list exceeds, as far as the host knows."""
        return max(self._offsets.values(), default=0) + self._steps

    def _grow_slots(self) -> None:
        old = self.num_slots
        new = min(max(FIRST_SLOTS, old * 2), self._max_rows)
        assert new > old, "more rows with penalties than rows"
        extra = new - old
        self._counts_SV = torch.cat((self._counts_SV, self._counts_SV.new_zeros(extra, self._vocab_size)))
        self._seen_SW = torch.cat((self._seen_SW, self._seen_SW.new_zeros(extra, self._seen_SW.shape[1])))
        self._length_S = torch.cat((self._length_S, self._length_S.new_zeros(extra)))
        self._free.extend(range(new - 1, old - 1, -1))

    def _fit_width(self) -> None:
        """Double the seen lists until the longest fits; new entries repeat the first token."""
        width = self._seen_SW.shape[1]
        while width < self.longest():
            width *= 2
        extra = width - self._seen_SW.shape[1]
        if extra:
            self._seen_SW = torch.cat((self._seen_SW, self._seen_SW[:, :1].expand(-1, extra)), dim=1)


def put_back(logits_RV: Tensor, places_E: Tensor, old_E: Tensor) -> None:
    """Write values to places (row * V + id) of contiguous logits."""
    logits_RV.view(-1).index_copy_(0, places_E, old_E)
