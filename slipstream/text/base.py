"""What does the engine need of a tokenizer? Ids in, text out, and which ids are special. No torch here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Tokenizer(Protocol):
    """Text to ids and back. Thread-safe. Ids are below `vocab_size`.

    `encode` puts BOS in front only with `add_special_tokens` and only where the model's tokenizer asks for it;
    with `parse_special=False` (user content) the text of a control token is encoded as ordinary text.
    """

    vocab_size: int
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    special_ids: frozenset[int]
    chat_template: str | None

    def encode(
        self, text: str, *, add_special_tokens: bool = True, parse_special: bool = True
    ) -> list[int]: ...

    def decode(
        self,
        ids: Sequence[int],
        *,
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
    ) -> str: ...

    def token_text(self, token_id: int) -> str:
        """Return one token's own text for display (logprobs); broken UTF-8 shows as U+FFFD."""
        ...
