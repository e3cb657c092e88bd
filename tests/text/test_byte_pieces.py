"""Bytes of tokens: the alphabet of byte-level BPE, byte tokens, spaces."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from slipstream.text.byte_pieces import ALPHABET, byte_pieces, bytes_of_byte_level, bytes_of_sentencepiece


def test_the_alphabet_is_the_librarys() -> None:
    assert sorted(ALPHABET) == sorted(pre_tokenizers.ByteLevel.alphabet())
    assert len(set(ALPHABET)) == 256
    # The library spells a space, the first byte outside the printable ones that text holds, as U+0120.
    assert ALPHABET[ord(" ")] == "Ġ" and ALPHABET[ord("a")] == "a"


@pytest.mark.parametrize(
    ("token", "expected"),
    [("Ġhello", b" hello"), ("Ã©", "é".encode()), ("<｜end｜>", "<｜end｜>".encode()), ("a b", b"a b")],
)
def test_byte_level_tokens(token: str, expected: bytes) -> None:
    assert bytes_of_byte_level(token) == expected


@pytest.mark.parametrize(
    ("token", "expected"),
    [("▁hello", b" hello"), ("<0xE4>", b"\xe4"), ("<0xe4>", b"\xe4"), ("<0xE4", b"<0xE4"), ("▁", b" ")],
)
def test_sentencepiece_tokens(token: str, expected: bytes) -> None:
    assert bytes_of_sentencepiece(token) == expected


SPACE, BYTES, FUSE = decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()


@pytest.mark.parametrize(
    ("decoder", "strips"),
    [
        (decoders.ByteLevel(), False),
        (decoders.Sequence([SPACE, BYTES, FUSE]), False),
        (decoders.Sequence([SPACE, BYTES, FUSE, decoders.Strip(" ", 1, 0)]), True),
        (decoders.Sequence([SPACE, BYTES, FUSE, decoders.Strip(" ", 2, 0)]), None),
        (decoders.Sequence([decoders.Replace("_", " "), BYTES, FUSE]), None),
        (decoders.Sequence([SPACE, BYTES]), None),
        (None, None),
    ],
)
def test_only_plain_joins_have_pieces(decoder: decoders.Decoder | None, strips: bool | None) -> None:
    backend = Tokenizer(models.BPE(vocab={"▁a": 0}, merges=[]))
    if decoder is not None:
        backend.decoder = decoder
    pieces = byte_pieces(backend)
    assert (None if pieces is None else pieces.strips_leading_space) == strips
    assert pieces is None or pieces[7] == b""
