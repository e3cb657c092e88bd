"""Which tokens end a turn, besides the one a model calls EOS?

Chat models end a turn with a token of their template, which many files do not list as EOS: generation would
run on into an invented next turn. A token counts if its name is a known turn end, it is in the vocabulary,
and the chat template writes it.
"""

from __future__ import annotations

from collections.abc import Callable

TURN_ENDS = (
    "<end_of_turn>",
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end|>",
    "<|end_of_turn|>",
    "<|eot|>",
    "<turn|>",
)


def turn_end_ids(template: str | None, token_id: Callable[[str], int | None]) -> list[int]:
    """Return the ids of the turn ends that `template` writes."""
    written = [text for text in TURN_ENDS if template and text in template]
    return [i for text in written if (i := token_id(text)) is not None]
