"""Which bytes does each token add to the text?

Two decoders cover nearly all decoder-only models, and both are a plain join of bytes: byte-level BPE (GPT-2,
`Language Models are Unsupervised Multitask Learners`, section 2.2) spells every byte as one printable
character, SentencePiece BPE spells a space as U+2581 and falls back to tokens named <0xNN>. Knowing the bytes
makes decoding incremental at O(1) a token and exact at every split.

Departure: the `tokenizers` library turns a run of byte tokens into text all or nothing, so one broken byte
spoils the whole run; here each complete character of the run survives, as it does in byte-level BPE. Valid
UTF-8 decodes identically.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from tokenizers import Tokenizer as Backend

SPACE_MARK = "▁"
BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenBytes(dict[int, bytes]):
    """Bytes by token id, filled on first use. Unknown ids have none: a padded embedding may sample them."""

    def __init__(
        self,
        spell: Callable[[int], str | None],
        to_bytes: Callable[[str], bytes],
        strips_leading_space: bool,
    ) -> None:
        super().__init__()
        self._spell = spell
        self._to_bytes = to_bytes
        self.strips_leading_space = strips_leading_space

    def __missing__(self, token_id: int) -> bytes:
        token = self._spell(token_id)
        self[token_id] = piece = b"" if token is None else self._to_bytes(token)
        return piece


def byte_pieces(backend: Backend) -> TokenBytes | None:
    """Return the pieces of `backend`, or None where its decoder is not a plain join of bytes."""
    if backend.decoder is None:
        return None
    state: dict[str, Any] = json.loads(backend.decoder.__getstate__())
    steps: list[dict[str, Any]] = state["decoders"] if state["type"] == "Sequence" else [state]
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return TokenBytes(backend.id_to_token, bytes_of_byte_level, False)
    if kinds[:3] != ["Replace", "ByteFallback", "Fuse"] or not is_space_replacement(steps[0]):
        return None
    if kinds[3:] == ["Strip"] and is_leading_space_strip(steps[3]):
        return TokenBytes(backend.id_to_token, bytes_of_sentencepiece, True)
    return TokenBytes(backend.id_to_token, bytes_of_sentencepiece, False) if len(kinds) == 3 else None


def is_space_replacement(step: dict[str, Any]) -> bool:
    return step["pattern"] == {"String": SPACE_MARK} and step["content"] == " "


def is_leading_space_strip(step: dict[str, Any]) -> bool:
    return (step["content"], step["start"], step["stop"]) == (" ", 1, 0)


def byte_alphabet() -> list[str]:
    """Return the character that spells each byte in byte-level BPE: itself if printable, else U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    rest = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(rest)) for byte in range(256)]


ALPHABET = byte_alphabet()
BYTE_OF = {character: byte for byte, character in enumerate(ALPHABET)}


def bytes_of_byte_level(token: str) -> bytes:
    """Undo the byte alphabet; an added token that leaves the alphabet is written as it is."""
    try:
        return bytes([BYTE_OF[character] for character in token])
    except KeyError:
        return token.encode()


def bytes_of_sentencepiece(token: str) -> bytes:
    match = BYTE_TOKEN.fullmatch(token)
    return bytes([int(match[1], 16)]) if match else token.replace(SPACE_MARK, " ").encode()
