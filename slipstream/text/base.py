"""What does the engine need of a tokenizer? Ids in, text out, and which ids are special. No torch here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol


class ControlSpan(NamedTuple):
    """A control token as it stands in a text: characters start..stop become `token_id`."""

    start: int
    stop: int
    token_id: int


class BytePieces(Protocol):
    """The bytes each token adds to the text, where a tokenizer's decoder is that simple.

    Text is these bytes joined and read as UTF-8 (broken sequences become U+FFFD); with
    `strips_leading_space` one space is dropped at the very beginning of a text. Unknown ids have no bytes.
    """

    strips_leading_space: bool

    def __getitem__(self, token_id: int, /) -> bytes: ...


class Tokenizer(Protocol):
    """Text to ids and back. Thread-safe. Ids are below `vocab_size` (the highest id + 1).

    `encode` puts BOS in front only with `add_special_tokens` and only where the model's tokenizer asks for
    it; with `parse_special=False` (user content) the text of a control token is encoded as ordinary text.
    `special_tokens` maps the names templates use (`bos_token`, `eos_token`, ...) to their texts;
    `byte_pieces` is None where the tokenizer cannot say what a token adds without its neighbours.
    """

    vocab_size: int
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    special_ids: frozenset[int]
    special_tokens: Mapping[str, str]
    chat_template: str | None
    byte_pieces: BytePieces | None

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

    def token_id(self, text: str) -> int | None:
        """Return the id of the token spelled `text` in the vocabulary."""
        ...

    def find_control(self, text: str) -> list[ControlSpan]:
        """Return the control tokens that `encode(text)` would see, in order."""
        ...

    def encode_ordinary(self, text: str, *, is_start: bool) -> list[int]:
        """Encode text without control tokens or BOS; with `is_start=False` it continues a text."""
        ...
