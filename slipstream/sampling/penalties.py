"""How do tokens already seen change the next ones? Per-row counts on the device, and the three penalties.

Repetition (over prompt and output): positive logits are divided, others multiplied, by the penalty; Keskar et
al., "CTRL", arXiv 1909.05858, section 4.1, with the sign rule that transformers and vLLM share. Presence and
frequency (over the output only): p if the token occurred, plus f per occurrence, are subtracted, as in
OpenAI's API reference. Repetition comes first, as in vLLM.

Invariant: only rows with a penalty own a slot of the tables, so a batch without penalties allocates nothing;
slots double up to `max_rows`. Shapes: P rows with penalties, V vocabulary, S slots.
"""

from __future__ import annotations

import torch
from torch import Tensor

FIRST_SLOTS = 4


class PenaltyTables:
    """Output counts [S, V] int32 and prompt membership [S, V] bool."""

    def __init__(self, *, max_rows: int, vocab_size: int, device: torch.device) -> None:
        self._max_rows = max_rows
        self._free: list[int] = []
        self._counts_SV = torch.zeros(0, vocab_size, dtype=torch.int32, device=device)
        self._in_prompt_SV = torch.zeros(0, vocab_size, dtype=torch.bool, device=device)

    @property
    def num_slots(self) -> int:
        return self._counts_SV.shape[0]

    def claim(self, prompt_ids: Tensor, output_ids: Tensor) -> int:
        """Return a slot that counts these tokens (int64, on the device)."""
        if not self._free:
            self._grow()
        slot = self._free.pop()
        self._counts_SV[slot].zero_()
        self._in_prompt_SV[slot].zero_()
        self._in_prompt_SV[slot].index_fill_(0, prompt_ids, True)
        ones = torch.ones_like(output_ids, dtype=torch.int32)
        self._counts_SV[slot].index_add_(0, output_ids, ones)
        return slot

    def release(self, slot: int) -> None:
        self._free.append(slot)

    def count(self, slots_P: Tensor, token_ids_P: Tensor) -> None:
        """Add one output token per slot; slots are distinct."""
        places = slots_P * self._counts_SV.shape[1] + token_ids_P
        ones = torch.ones_like(places, dtype=torch.int32)
        self._counts_SV.view(-1).index_add_(0, places, ones)

    def penalise(
        self, x_PV: Tensor, slots_P: Tensor, *, repetition_P: Tensor, presence_P: Tensor, frequency_P: Tensor
    ) -> Tensor:
        """Return penalised float32 logits [P, V]; parameters are float32 [P]."""
        counts = self._counts_SV.index_select(0, slots_P)
        occurred = counts > 0
        seen = self._in_prompt_SV.index_select(0, slots_P).logical_or_(occurred)
        repetition = repetition_P[:, None]
        repeated = torch.where(x_PV > 0, x_PV / repetition, x_PV * repetition)
        x_PV = torch.where(seen, repeated, x_PV)
        return x_PV.sub_(counts * frequency_P[:, None]).sub_(occurred * presence_P[:, None])

    def _grow(self) -> None:
        old = self.num_slots
        new = min(max(FIRST_SLOTS, old * 2), self._max_rows)
        assert new > old, "more rows with penalties than rows"
        extra = new - old
        for name in ("_counts_SV", "_in_prompt_SV"):
            table: Tensor = getattr(self, name)
            setattr(self, name, torch.cat((table, table.new_zeros(extra, table.shape[1]))))
        self._free.extend(range(new - 1, old - 1, -1))
