"""GGUF tokenizers: ids of other implementations, both kinds, and metadata that do not fit together."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from slipstream.core.errors import CheckpointError
from slipstream.text.from_gguf import load_tokenizer_gguf
from slipstream.text.tokenizer import FastTokenizer
from tests.text.small_models import CONTROL, byte_level_metadata, sentencepiece_metadata

TEXTS = [
    "Hello world",
    "  two  spaces\n\n\n tabs\t\t x",
    "def f(x):\n    return x**2  # ok",
    "你好，世界！こんにちは 안녕하세요",
    "emoji 😀👩‍👩‍👧‍👦 é e\u0301",
    "17 + 25 = 42; 1234567890 ½²³ ٣٤ Ⅷ",
    "don't I'LL we've",
    "<|im_start|>user\nhi<|im_end|>",
    "a\u00a0b\u3000c\u200bd\r\n\r\nx",
    "<start_of_turn>x<end_of_turn>",
    " leading",
    "▁▁x ▁",
    "\x00\x01\ufffd",
    "",
    "   ",
    "<0x0A><unk>x<pad>",
]


def tokens_of(metadata: dict[str, Any], kind: int) -> list[str]:
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    return [token for token, its_kind in zip(tokens, types, strict=True) if its_kind == kind]


@pytest.mark.parametrize("model", ["smollm2-135m-instruct-q4_1", "gemma-3-270m-q4_k_m"])
def test_ids_and_text_are_the_references(
    model: str, smollm2: FastTokenizer, gemma3: FastTokenizer, reference_cases: list[dict[str, Any]]
) -> None:
    tokenizer = smollm2 if model.startswith("smollm2") else gemma3
    cases = [case for case in reference_cases if case["model"] == model]
    assert len(cases) >= 2
    for case in cases:
        ids = tokenizer.encode(case["rendered_prompt"], add_special_tokens=case["mode"] == "raw")
        assert ids == case["prompt_token_ids"]
        assert tokenizer.decode(case["output_token_ids"], skip_special_tokens=False) == case["text"]


def test_smollm2_equals_the_librarys_own_pipeline(
    smollm2: FastTokenizer, smollm2_metadata: dict[str, Any]
) -> None:
    """Built from the same vocabulary by the names its authors used: Digits, then ByteLevel."""
    vocab = {token: i for i, token in enumerate(smollm2_metadata["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ")) for merge in smollm2_metadata["tokenizer.ggml.merges"]]
    oracle = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    oracle.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    oracle.decoder = decoders.ByteLevel()
    control = tokens_of(smollm2_metadata, CONTROL)
    oracle.add_special_tokens([AddedToken(token, normalized=False) for token in control])
    for text in TEXTS:
        assert smollm2.encode(text) == oracle.encode(text).ids


def test_what_the_two_files_say_about_themselves(smollm2: FastTokenizer, gemma3: FastTokenizer) -> None:
    assert (smollm2.vocab_size, smollm2.eos_token_ids, smollm2.bos_token_id) == (49152, (2,), 1)
    assert (gemma3.vocab_size, gemma3.eos_token_ids, gemma3.bos_token_id) == (262144, (1,), 2)
    assert gemma3.special_tokens["bos_token"] == "<bos>" and gemma3.chat_template is None
    assert len(smollm2.special_ids) == 17 and len(gemma3.special_ids) == 6249


def test_gemma_text(gemma3: FastTokenizer) -> None:
    # "▁" is Gemma's spelling of a space, so it comes back as one.
    for text in [text for text in TEXTS if "▁" not in text]:
        ids = gemma3.encode(text, parse_special=False)
        assert gemma3.decode(ids) == text
    assert gemma3.encode("\n\n\n", add_special_tokens=False) == [109]
    assert gemma3.encode("a   b", add_special_tokens=False)[1] == 139  # three spaces are one token


@pytest.mark.timeout(120)
def test_gemma_loads_in_time(gemma3: FastTokenizer, gemma3_metadata: dict[str, Any]) -> None:
    # 1.6 s of CPU time when idle; the rest is room for slow hosts.
    start = time.process_time()
    again = load_tokenizer_gguf(gemma3_metadata)
    assert time.process_time() - start < 6.0
    assert again.encode(TEXTS[0]) == gemma3.encode(TEXTS[0])


def test_sentencepiece_puts_a_space_in_front_unless_told_not_to() -> None:
    adding = load_tokenizer_gguf(sentencepiece_metadata())
    plain = load_tokenizer_gguf(sentencepiece_metadata(**{"tokenizer.ggml.add_space_prefix": False}))
    assert adding.encode("hello world") == [1, adding.token_id("▁hello"), adding.token_id("▁world")]
    assert plain.encode("hello world")[1] == plain.token_id("he")
    assert adding.decode(adding.encode("hello")) == "hello" == plain.decode(plain.encode("hello"))
    assert plain.decode(plain.encode(" hello")) == " hello"


def test_phi3_writes_the_space_into_the_text() -> None:
    phi3 = load_tokenizer_gguf(sentencepiece_metadata(**{"general.architecture": "phi3"}))
    llama = load_tokenizer_gguf(sentencepiece_metadata())
    assert phi3.encode("hello") == llama.encode("hello")
    assert phi3.encode(" hello") == [1, phi3.token_id("▁"), phi3.token_id("▁hello")]
    assert llama.encode(" hello") == [1, llama.token_id("▁hello")]


def test_characters_without_a_piece_fall_back_to_bytes() -> None:
    tokenizer = load_tokenizer_gguf(sentencepiece_metadata())
    ids = tokenizer.encode("hello é", add_special_tokens=False)
    assert [tokenizer.token_id(f"<0x{byte:02X}>") for byte in "é".encode()] == ids[-2:]
    assert tokenizer.decode(ids) == "hello é"


def test_merges_never_make_a_control_or_byte_token() -> None:
    tokenizer = load_tokenizer_gguf(sentencepiece_metadata())  # it holds "<s" and ">" beside "<s>"
    ids = tokenizer.encode("<s> <unk> <0x41>", add_special_tokens=False, parse_special=False)
    assert {0, 1, 2}.isdisjoint(ids)
    assert tokenizer.token_id("<0x41>") not in ids
    assert tokenizer.decode(ids) == "<s> <unk> <0x41>"


def test_spaces_written_plainly_are_the_models_spelling() -> None:
    metadata = sentencepiece_metadata()
    tokens = metadata["tokenizer.ggml.tokens"]
    tokens[tokens.index("▁▁")] = "  "
    respelled = load_tokenizer_gguf(metadata)
    assert respelled.encode("a  b") == load_tokenizer_gguf(sentencepiece_metadata()).encode("a  b")


def test_numpy_arrays_and_lists_are_the_same() -> None:
    metadata = sentencepiece_metadata()
    arrays = metadata | {
        "tokenizer.ggml.scores": np.asarray(metadata["tokenizer.ggml.scores"], dtype=np.float32),
        "tokenizer.ggml.token_type": np.asarray(metadata["tokenizer.ggml.token_type"], dtype=np.int32),
    }
    assert load_tokenizer_gguf(arrays).encode("hello wor") == load_tokenizer_gguf(metadata).encode(
        "hello wor"
    )


def test_byte_level_files_say_whether_bos_goes_in_front() -> None:
    bos = byte_level_metadata()["tokenizer.ggml.bos_token_id"]
    assert load_tokenizer_gguf(byte_level_metadata()).encode("hello")[0] != bos
    llama3 = load_tokenizer_gguf(byte_level_metadata(**{"tokenizer.ggml.pre": "llama-bpe"}))
    assert llama3.encode("hello")[0] == bos
    told = byte_level_metadata(**{"tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.add_bos_token": False})
    assert load_tokenizer_gguf(told).encode("hello")[0] != bos


def test_a_control_token_outside_the_byte_alphabet_works() -> None:
    metadata = byte_level_metadata()
    tokens = metadata["tokenizer.ggml.tokens"]
    tokens[-2] = "<｜end▁of▁sentence｜>"
    tokenizer = load_tokenizer_gguf(metadata)
    assert tokenizer.encode("hello<｜end▁of▁sentence｜>")[-1] == len(tokens) - 2
    assert tokenizer.decode([len(tokens) - 2], skip_special_tokens=False) == tokens[-2]


def test_every_end_of_turn_ends_a_request() -> None:
    extra = {"tokenizer.ggml.eot_token_id": 260, "tokenizer.ggml.eom_token_id": 259}
    template = "{{ '<|im_start|>' }}x{{ '<|im_end|>' }}"
    metadata = byte_level_metadata()
    end = metadata["tokenizer.ggml.eos_token_id"]
    assert load_tokenizer_gguf(metadata | extra).eos_token_ids == (end, 260, 259)
    other = metadata | {"tokenizer.ggml.eos_token_id": 0, "tokenizer.chat_template": template}
    assert load_tokenizer_gguf(other).eos_token_ids == (0, end)
    assert load_tokenizer_gguf(other).chat_template == template


BROKEN: list[tuple[dict[str, Any], str]] = [
    ({"tokenizer.ggml.model": "t5"}, "'t5'.*supported: gpt2, llama"),
    ({"tokenizer.ggml.pre": "gpt-3"}, "'gpt-3'.*supported: .*smollm.*Did you mean 'gpt-2'"),
    ({"tokenizer.ggml.tokens": []}, "no tokens"),
    ({"tokenizer.ggml.token_type": [1]}, "1 entries for"),
    ({"tokenizer.ggml.bos_token_id": 10**6}, "bos_token_id of the GGUF file is 1000000"),
    ({"tokenizer.ggml.merges": None}, "no tokenizer.ggml.merges"),
    ({"tokenizer.ggml.merges": ["he"]}, "not two tokens"),
    ({"tokenizer.ggml.merges": ["q q"]}, "do not fit its tokens"),
]


@pytest.mark.parametrize(("change", "message"), BROKEN)
def test_metadata_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_tokenizer_gguf(byte_level_metadata(**change))


def test_a_token_listed_twice_is_refused() -> None:
    metadata = byte_level_metadata()
    metadata["tokenizer.ggml.tokens"][5] = "<think>"
    with pytest.raises(CheckpointError, match="'<think>' at ids 5 and"):
        load_tokenizer_gguf(metadata)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("model", ["smollm2", "gemma3"])
def test_ids_are_those_of_transformers(model: str, request: pytest.FixtureRequest) -> None:
    from transformers import AutoTokenizer

    path: Path = request.getfixturevalue(f"{model}_path")
    tokenizer: FastTokenizer = request.getfixturevalue(model)
    theirs = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    if model == "smollm2":
        # Their conversion knows no pre-tokenizer "smollm" and leaves out the cut between digits.
        theirs.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    rng = np.random.default_rng(0)
    letters = [
        chr(c) for c in [*range(32, 127), *range(0xA0, 0x250), *range(0x600, 0x700), *range(0x4E00, 0x4F00)]
    ]
    mixed = ["".join(rng.choice(letters, size=40)) for _ in range(2000)]
    for text in [*TEXTS, *mixed]:
        ids = tokenizer.encode(text)
        assert ids == theirs.encode(text)
        assert tokenizer.decode(ids, skip_special_tokens=False) == theirs.decode(ids)
