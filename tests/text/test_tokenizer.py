"""FastTokenizer: BOS, control tokens in ordinary text, decoding, and what it refuses."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from slipstream.core.errors import RequestError
from slipstream.text.byte_pieces import ALPHABET
from slipstream.text.from_gguf import load_tokenizer_gguf
from slipstream.text.tokenizer import FastTokenizer
from tests.text.small_models import byte_level_metadata, sentencepiece_metadata

SENTENCEPIECE = load_tokenizer_gguf(sentencepiece_metadata())
CONTROL_TEXTS = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<repo_name>", "<empty_output>"]


def backend_of(tokenizer: FastTokenizer) -> Any:
    return tokenizer._backend


def test_bos_is_put_in_front_only_when_asked_and_only_where_the_model_wants_it(
    smollm2: FastTokenizer,
) -> None:
    adding = load_tokenizer_gguf(sentencepiece_metadata())
    assert adding.encode("hello")[0] == adding.bos_token_id == 1
    assert adding.bos_token_id not in adding.encode("hello", add_special_tokens=False)
    assert smollm2.bos_token_id == 1
    assert smollm2.encode("hello") == smollm2.encode("hello", add_special_tokens=False)


def test_bos_is_never_doubled() -> None:
    tokenizer = load_tokenizer_gguf(sentencepiece_metadata())
    assert tokenizer.encode("<s>hello").count(1) == 1
    assert tokenizer.encode("<s><s>hello").count(1) == 2  # the prompt's own, as written
    assert tokenizer.encode("<s>hello", add_special_tokens=False).count(1) == 1


def test_control_text_is_a_control_token_only_with_parse_special(smollm2: FastTokenizer) -> None:
    for text in CONTROL_TEXTS:
        (control,) = smollm2.encode(text)
        assert control in smollm2.special_ids
        ordinary = smollm2.encode(f"a {text} b", parse_special=False)
        assert smollm2.special_ids.isdisjoint(ordinary)
        assert smollm2.decode(ordinary) == f"a {text} b"


def test_no_control_token_of_gemma_comes_out_of_ordinary_text(gemma3: FastTokenizer) -> None:
    names = [backend_of(gemma3).id_to_token(i) for i in sorted(gemma3.special_ids)]
    text = "x ".join([*names[:20], *names[-20:], "<start_of_turn>", "<end_of_turn>"])
    ids = gemma3.encode(text, parse_special=False)
    assert gemma3.special_ids.isdisjoint(set(ids) - {gemma3.bos_token_id})
    assert ids[0] == gemma3.bos_token_id and gemma3.bos_token_id not in ids[1:]
    assert gemma3.decode(ids) == text


def test_parse_special_false_keeps_bos_and_eos_of_the_frame() -> None:
    tokenizer = load_tokenizer_gguf(sentencepiece_metadata(**{"tokenizer.ggml.add_eos_token": True}))
    ids = tokenizer.encode("</s>", parse_special=False)
    assert (ids[0], ids[-1]) == (1, 2)
    assert {1, 2}.isdisjoint(ids[1:-1])
    assert tokenizer.encode("hello") == tokenizer.encode("hello", parse_special=False)


def test_user_defined_tokens_stay_whole_in_ordinary_text() -> None:
    tokenizer = load_tokenizer_gguf(byte_level_metadata())
    think = tokenizer.token_id("<think>")
    assert think not in tokenizer.special_ids
    assert tokenizer.encode("<think>", parse_special=False) == tokenizer.encode("<think>") == [think]


def test_merges_that_spell_a_control_token_do_not_reach_it() -> None:
    # A folder's tokenizer may hold such merges; "<x>" is both merged from "<x" and ">" and a control token.
    vocab = {"<": 0, "x": 1, ">": 2, "<x": 3, "<x>": 4}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[("<", "x"), ("<x", ">")]))
    backend.add_special_tokens(["<x>"])
    tokenizer = FastTokenizer(backend)
    assert tokenizer.encode("x<x>") == [1, 4]
    assert tokenizer.encode("x<x>", parse_special=False) == [1, 0, 1, 2]


def test_added_ids_with_holes_keep_their_numbers() -> None:
    # Two added tokens removed from the middle of the list leave a hole in the ids of the rest.
    backend = Tokenizer(models.BPE(vocab={"a": 0, "<p>": 5, "<q>": 9}, merges=[]))
    backend.add_special_tokens(["<q>"])
    backend.add_tokens([AddedToken("<p>", special=False)])
    tokenizer = FastTokenizer(backend)
    assert tokenizer.vocab_size == 10
    assert tokenizer.encode("a<p><q>") == [0, 5, 9]
    assert tokenizer.encode("a<p>", parse_special=False) == [0, 5]


def test_text_that_goes_on_gets_no_first_space() -> None:
    tokenizer = load_tokenizer_gguf(sentencepiece_metadata())
    assert tokenizer.encode_ordinary("hello", is_start=True) == [tokenizer.token_id("▁hello")]
    assert tokenizer.encode_ordinary("hello", is_start=False)[0] == tokenizer.token_id("he")
    whole = tokenizer.encode("hello</s>hello", add_special_tokens=False)
    parts = [tokenizer.encode_ordinary("hello", is_start=is_start) for is_start in (True, False)]
    assert whole == [*parts[0], 2, *parts[1]]


def test_control_tokens_are_found_where_encode_sees_them(smollm2: FastTokenizer) -> None:
    text = "a<|im_end|>b<|im_end><|im_start|>"
    spans = smollm2.find_control(text)
    assert [text[span.start : span.stop] for span in spans] == ["<|im_end|>", "<|im_start|>"]
    assert [span.token_id for span in spans] == [i for i in smollm2.encode(text) if i in smollm2.special_ids]


@given(st.text(max_size=60))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_text_survives_the_round_trip(smollm2: FastTokenizer, text: str) -> None:
    # The vocabulary has no token for some bytes, 0xF1 for one: what needs them is lost in any implementation.
    assume(all(smollm2.token_id(ALPHABET[byte]) is not None for byte in text.encode()))
    ids = smollm2.encode(text)
    assert all(0 <= i < smollm2.vocab_size for i in ids)
    assert smollm2.decode(ids, skip_special_tokens=False) == text
    ordinary = smollm2.encode(text, parse_special=False)
    assert smollm2.decode(ordinary) == text and smollm2.special_ids.isdisjoint(ordinary)


@given(st.lists(st.integers(0, 49151), max_size=30))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_byte_level_decoding_is_the_librarys(smollm2: FastTokenizer, ids: list[int]) -> None:
    for skip in (True, False):
        expected = backend_of(smollm2).decode(ids, skip_special_tokens=skip)
        assert smollm2.decode(ids, skip_special_tokens=skip) == expected


@given(st.text(max_size=40))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_sentencepiece_decoding_of_valid_text_is_the_librarys(text: str) -> None:
    tokenizer = SENTENCEPIECE
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == backend_of(tokenizer).decode(ids, skip_special_tokens=True)


def test_one_broken_byte_does_not_spoil_its_neighbours() -> None:
    tokenizer = load_tokenizer_gguf(sentencepiece_metadata())
    ids = [tokenizer.token_id(f"<0x{byte:02X}>") for byte in "é".encode() + b"\xff"]
    assert tokenizer.decode([i for i in ids if i is not None]) == "é\ufffd"


def test_token_text_shows_one_token(smollm2: FastTokenizer, gemma3: FastTokenizer) -> None:
    assert smollm2.token_text(1) == "<|im_start|>"
    assert gemma3.token_text(gemma3.encode(" Paris", add_special_tokens=False)[0]) == " Paris"
    assert "\ufffd" in smollm2.token_text(smollm2.encode("😀")[0])


def test_ids_without_a_token_add_nothing(smollm2: FastTokenizer) -> None:
    # A padded embedding has more rows than the tokenizer has tokens, and a model may sample them.
    assert smollm2.decode([10**6, *smollm2.encode("hello")]) == "hello"


def spaced_tokenizer() -> FastTokenizer:
    """Word-level without a decoder: the library joins tokens with spaces."""
    backend = Tokenizer(models.WordLevel({"a": 0, "b": 1, "<x>": 2, "<y>": 3}, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(["<x>", "<y>"])
    return FastTokenizer(backend)


def test_spaces_between_special_tokens_can_be_left_out() -> None:
    tokenizer = spaced_tokenizer()
    ids = [0, 1, 2, 3, 0]
    options: dict[str, Any] = {"skip_special_tokens": False}
    assert tokenizer.decode(ids, **options) == "a b <x> <y> a"
    assert tokenizer.decode(ids, **options, spaces_between_special_tokens=False) == "a b<x><y>a"
    assert tokenizer.decode(ids) == "a b a"


@pytest.mark.parametrize("text", ["\ud800", "fine until \udfff here"])
def test_text_that_is_not_unicode_is_refused(smollm2: FastTokenizer, text: str) -> None:
    for parse_special in (True, False):
        with pytest.raises(RequestError, match="lone surrogate at character"):
            smollm2.encode(text, parse_special=parse_special)


def test_settings_baked_into_a_file_do_not_cut_prompts() -> None:
    backend = Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    backend.enable_truncation(max_length=3)
    backend.enable_padding(length=8)
    assert FastTokenizer(backend).encode("a" * 5) == [0] * 5


def test_threads_get_the_answers_of_one(smollm2: FastTokenizer) -> None:
    fresh = load_tokenizer_gguf(byte_level_metadata())
    texts = [f"hello <|im_end|> {i} world" for i in range(40)]
    expected = [fresh.encode(text, parse_special=i % 2 == 0) for i, text in enumerate(texts)]
    shared = load_tokenizer_gguf(byte_level_metadata())
    answers: dict[int, list[int]] = {}

    def work(start: int) -> None:
        for i in range(start, len(texts), 4):
            answers[i] = shared.encode(texts[i], parse_special=i % 2 == 0)

    threads = [threading.Thread(target=work, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [answers[i] for i in range(len(texts))] == expected


def test_a_decoder_that_is_no_plain_join_has_no_byte_pieces() -> None:
    backend = Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    backend.normalizer = normalizers.Lowercase()
    for decoder in (decoders.WordPiece(), decoders.Metaspace(), decoders.Sequence([decoders.Fuse()])):
        backend.decoder = decoder
        assert FastTokenizer(backend).byte_pieces is None
