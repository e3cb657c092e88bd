"""Streaming text: no half characters, nothing lost, whatever the ids."""

from __future__ import annotations

import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from slipstream.text.detokenizer import MAX_WINDOW, IncrementalDetokenizer
from slipstream.text.from_gguf import load_tokenizer_gguf
from slipstream.text.tokenizer import FastTokenizer
from tests.text.small_models import sentencepiece_metadata

EMOJI_PLANE = range(0x10000, 0x20000)
OTHER_PLANES = range(0x20000, 0x110000)
SENTENCEPIECE = load_tokenizer_gguf(sentencepiece_metadata())
SCRIPTS = [
    "日本語のテキスト",
    "안녕하세요",
    "👩‍👩‍👧‍👦🏳️‍🌈👍🏽",
    "नमस्ते",
    "e\u0301\u0323",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 \U0010fffd",
    "a\u00a0b\u3000c",
]


def pieces_of(tokenizer: Any, ids: list[int], prompt: list[int] | None = None, **options: Any) -> list[str]:
    stream = IncrementalDetokenizer(tokenizer, prompt or [], **options)
    return [*(stream.append([token_id]) for token_id in ids), stream.flush()]


def byte_ids(tokenizer: FastTokenizer, text: str) -> list[int]:
    found = [tokenizer.token_id(f"<0x{byte:02X}>") for byte in text.encode()]
    return [token_id for token_id in found if token_id is not None]


@pytest.mark.parametrize(
    "codes",
    [
        EMOJI_PLANE,
        OTHER_PLANES[::16],
        pytest.param(OTHER_PLANES, marks=[pytest.mark.slow, pytest.mark.timeout(600)]),
    ],
    ids=["every emoji", "sixteenth of the rest", "every other"],
)
def test_every_character_of_four_bytes_token_by_token(codes: range) -> None:
    tokenizer = load_tokenizer_gguf(sentencepiece_metadata())
    text = "".join(map(chr, codes))
    ids = byte_ids(tokenizer, text)
    assert len(ids) == 4 * len(text)
    stream = IncrementalDetokenizer(tokenizer)
    append = stream.append
    pieces = [append((token_id,)) for token_id in ids]
    assert not any(pieces[0::4]) and not any(pieces[1::4]) and not any(pieces[2::4])
    assert "".join(pieces[3::4]) == text
    assert stream.flush() == ""


@pytest.mark.parametrize("text", SCRIPTS)
def test_scripts_come_out_whole(smollm2: FastTokenizer, gemma3: FastTokenizer, text: str) -> None:
    for tokenizer in (smollm2, gemma3):
        ids = tokenizer.encode(text, add_special_tokens=False)
        pieces = pieces_of(tokenizer, ids)
        assert "".join(pieces) == text
        assert "\ufffd" not in "".join(pieces)
    bytes_ = byte_ids(gemma3, text)
    assert "".join(pieces_of(gemma3, bytes_)) == text


@given(st.lists(st.integers(0, 49151), max_size=40), st.booleans())
@settings(max_examples=200, deadline=None, derandomize=True)
def test_pieces_add_up_to_decode(smollm2: FastTokenizer, ids: list[int], skip: bool) -> None:
    assert "".join(pieces_of(smollm2, ids, skip_special_tokens=skip)) == smollm2.decode(
        ids, skip_special_tokens=skip
    )


@given(st.lists(st.integers(0, 49151), max_size=30), st.lists(st.integers(1, 5), max_size=10))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_chunks_of_any_size_give_the_same_text(
    smollm2: FastTokenizer, ids: list[int], sizes: list[int]
) -> None:
    stream = IncrementalDetokenizer(smollm2)
    rest, pieces = list(ids), []
    for size in sizes:
        pieces.append(stream.append(rest[:size]))
        rest = rest[size:]
    pieces += [stream.append(rest), stream.flush()]
    assert "".join(pieces) == smollm2.decode(ids)


@given(st.text(st.characters(exclude_characters="\ufffd"), max_size=30), st.integers(0, 30))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_prompt_and_pieces_are_the_whole_text(smollm2: FastTokenizer, text: str, cut: int) -> None:
    for tokenizer in (smollm2, SENTENCEPIECE):
        ids = tokenizer.encode(text, add_special_tokens=False, parse_special=False)
        prompt, output = ids[:cut], ids[cut:]
        shown = "".join(pieces_of(tokenizer, output, prompt))
        head = tokenizer.decode(prompt)
        whole = tokenizer.decode(ids)
        if head.endswith("\ufffd"):  # the prompt ends in a character that the output finishes
            assert whole.endswith(shown)
        else:
            assert head + shown == whole


def test_the_first_space_is_kept_after_a_prompt_and_dropped_without() -> None:
    tokenizer = load_tokenizer_gguf(sentencepiece_metadata())
    hello, world = tokenizer.encode("hello world", add_special_tokens=False)
    assert "".join(pieces_of(tokenizer, [world], [1, hello])) == " world"
    assert "".join(pieces_of(tokenizer, [world], [1])) == "world"
    assert "".join(pieces_of(tokenizer, [world])) == "world" == tokenizer.decode([world])
    # Shown, BOS is text too: the word does not stand at the beginning any more.
    assert "".join(pieces_of(tokenizer, [world], [1], skip_special_tokens=False)) == " world"


def test_a_character_the_prompt_began_is_finished_by_the_output(gemma3: FastTokenizer) -> None:
    ids = byte_ids(gemma3, "é😀")
    assert pieces_of(gemma3, ids[3:], ids[:3]) == ["", "", "😀", ""]


def test_special_tokens_are_skipped_or_shown(smollm2: FastTokenizer) -> None:
    ids = [*smollm2.encode("hi"), 2]
    assert "".join(pieces_of(smollm2, ids)) == "hi"
    assert "".join(pieces_of(smollm2, ids, skip_special_tokens=False)) == "hi<|im_end|>"


def test_a_broken_end_comes_out_at_flush(smollm2: FastTokenizer) -> None:
    ids = smollm2.encode("x😀")[:-1]
    stream = IncrementalDetokenizer(smollm2)
    assert stream.append(ids) == "x"
    assert stream.flush() == "\ufffd"
    assert stream.flush() == ""


def windowed_tokenizer() -> FastTokenizer:
    """Bytes and words behind a decoder without pieces, so that text comes from decoding windows again."""
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"▁hello": 256, "▁wor": 257, "ld": 258}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    steps = [decoders.ByteFallback(), decoders.Metaspace()]
    backend.decoder = decoders.Sequence(steps)
    return FastTokenizer(backend)


def test_windows_release_whole_characters_and_keep_spaces() -> None:
    tokenizer = windowed_tokenizer()
    assert tokenizer.byte_pieces is None
    ids = [256, 257, 258, *"😀".encode(), 256]
    pieces = pieces_of(tokenizer, ids)
    assert pieces == ["hello", " wor", "ld", "", "", "", "😀", " hello", ""]
    assert "".join(pieces) == tokenizer.decode(ids)
    assert "".join(pieces_of(tokenizer, [257, 258], [256])) == " world"


def test_a_window_of_endless_broken_bytes_is_released() -> None:
    pieces = pieces_of(windowed_tokenizer(), [0xFF] * (3 * MAX_WINDOW))
    assert any(pieces[:-1])
    assert len("".join(pieces)) == 3 * MAX_WINDOW


def test_cost_does_not_grow_with_the_output(smollm2: FastTokenizer) -> None:
    ids = smollm2.encode("The quick brown fox jumps over the lazy dog. 日本 ") * 1500
    stream = IncrementalDetokenizer(smollm2)
    start = time.perf_counter()
    for token_id in ids:
        stream.append((token_id,))
    # About 1 us a token when idle; decoding everything again would take minutes for these 25,000 tokens.
    assert time.perf_counter() - start < 5.0
    assert len(ids) > 20_000
