"""How much of a step does each prompt get? One class per context chunking policy, over token counts only.

FIRST_COME_FIRST_SERVED gives the oldest prompt all there is, and what it leaves to the next. EQUAL_PROGRESS
gives every prompt that could run the same number of tokens, so that none waits for another to end; what a
short one leaves goes to those after it.
"""

from __future__ import annotations

from slipstream.core.registry import Registry
from slipstream.engine.sequence import Sequence

POLICIES = Registry(
    "context chunking policy",
    {
        "FIRST_COME_FIRST_SERVED": "slipstream.engine.chunking:FirstComeFirstServed",
        "EQUAL_PROGRESS": "slipstream.engine.chunking:EqualProgress",
    },
)


class FirstComeFirstServed:
    """All of a step for the oldest prompt."""

    def ordered(self, prefilling: list[Sequence]) -> list[Sequence]:
        """Return the running prompts in the order in which they get their share; a copy."""
        return list(prefilling)

    def share(self, budget: int, num_prompts: int) -> int:
        """Return how many of `budget` tokens the first of `num_prompts` prompts may take."""
        return budget


class EqualProgress(FirstComeFirstServed):
    """The same for every prompt."""

    def ordered(self, prefilling: list[Sequence]) -> list[Sequence]:
        # Those with little left first: what they do not need is shared by the others.
        return sorted(prefilling, key=lambda sequence: sequence.prefill_end - sequence.num_scheduled)

    def share(self, budget: int, num_prompts: int) -> int:
        return -(-budget // max(1, num_prompts))
