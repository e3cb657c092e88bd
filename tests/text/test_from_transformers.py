"""Folders without tokenizer.json: converted or run by transformers, never by code of the folder."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from slipstream.core.errors import CheckpointError, MissingExtraError
from slipstream.text.byte_pieces import ALPHABET
from slipstream.text.detokenizer import IncrementalDetokenizer
from slipstream.text.from_folder import load_tokenizer_folder
from slipstream.text.from_transformers import SlowTokenizer
from slipstream.text.tokenizer import FastTokenizer
from tests.text.small_models import write_folder

BYT5 = {"tokenizer_class": "ByT5Tokenizer", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}


def gpt2_folder(folder: Path) -> Path:
    vocab = {text: i for i, text in enumerate([*ALPHABET, "he", "<|endoftext|>"])}
    config = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>"}
    return write_folder(folder, vocab=vocab, merges__txt="#version: 0.2\nh e\n", tokenizer_config=config)


def test_separate_merges_become_a_fast_tokenizer(tmp_path: Path) -> None:
    tokenizer = load_tokenizer_folder(gpt2_folder(tmp_path))
    assert isinstance(tokenizer, FastTokenizer)
    assert tokenizer.encode("he<|endoftext|>") == [256, 257]
    assert tokenizer.eos_token_ids == (257,)
    assert tokenizer.decode([256, 257]) == "he"
    assert 257 not in tokenizer.encode("<|endoftext|>", parse_special=False)


def test_a_tokenizer_in_python_is_served(tmp_path: Path) -> None:
    tokenizer = load_tokenizer_folder(write_folder(tmp_path, tokenizer_config=BYT5))
    assert isinstance(tokenizer, SlowTokenizer)
    text = "hé 😀"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode(text)[-1] == tokenizer.eos_token_ids[0]
    stream = IncrementalDetokenizer(tokenizer)
    assert "".join([*(stream.append([token_id]) for token_id in ids), stream.flush()]) == text
    assert tokenizer.token_text(ids[0]) == "h"


def test_control_text_stays_text_in_python_too(tmp_path: Path) -> None:
    tokenizer = load_tokenizer_folder(write_folder(tmp_path, tokenizer_config=BYT5))
    (span,) = tokenizer.find_control("a</s>b")
    assert (span.start, span.stop, span.token_id) == (1, 5, tokenizer.eos_token_ids[0])
    assert tokenizer.special_ids.isdisjoint(tokenizer.encode_ordinary("a</s>b", is_start=True))


def test_code_of_the_folder_is_refused_and_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    config = {"auto_map": {"AutoTokenizer": ["code.Evil", None]}, "tokenizer_class": "Evil"}
    code = f"open({json.dumps(str(marker))}, 'w')\nclass Evil: pass\n"
    with pytest.raises(CheckpointError, match="Python code of the checkpoint"):
        load_tokenizer_folder(write_folder(tmp_path, tokenizer_config=config, code__py=code))
    assert not marker.exists()


def test_the_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = gpt2_folder(tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtraError, match=r"pip install slipstream-llm\[transformers\]"):
        load_tokenizer_folder(folder)


def test_folders_without_a_tokenizer_say_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is empty"):
        load_tokenizer_folder(tmp_path)
    with pytest.raises(CheckpointError, match="cannot load a tokenizer"):
        load_tokenizer_folder(write_folder(tmp_path, readme__txt="nothing here"))
