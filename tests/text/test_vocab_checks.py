"""Tokenizers that do not fit their model, and files that are not what they should be."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from slipstream.core.errors import CheckpointError
from slipstream.text.from_gguf import load_tokenizer_gguf
from slipstream.text.tokenizer import FastTokenizer
from slipstream.text.vocab_checks import check_unique, check_vocab, read_bounded
from tests.text.small_models import byte_level_metadata, tokenizer_json, write_folder


def test_every_id_needs_an_embedding_row(smollm2: FastTokenizer) -> None:
    check_vocab(smollm2, 49152)
    check_vocab(smollm2, 49280)  # padded embeddings are common
    with pytest.raises(CheckpointError, match=r"highest id is 49151 .*49151 embedding rows"):
        check_vocab(smollm2, 49151)


def test_end_ids_need_a_row_too() -> None:
    backend = load_tokenizer_gguf(byte_level_metadata())._backend
    for end in (-1, 10**6):
        with pytest.raises(CheckpointError, match="End-of-sequence ids"):
            check_vocab(FastTokenizer(backend, eos_token_ids=[end]), 300)


def test_media_placeholders_of_text_only_exports_are_tolerated(tmp_path: Path) -> None:
    from slipstream.text.from_folder import load_tokenizer_folder
    from tests.text.small_models import added_token

    added = [*tokenizer_json()["added_tokens"], added_token(260, "<image_soft_token>")]
    folder = write_folder(tmp_path, tokenizer=tokenizer_json(added_tokens=added))
    tokenizer = load_tokenizer_folder(folder)
    check_vocab(tokenizer, 260)
    with pytest.raises(CheckpointError, match="highest id is 259"):
        check_vocab(tokenizer, 259)


def test_tokens_are_unique() -> None:
    check_unique(["a", "b"], "x")
    with pytest.raises(CheckpointError, match="x lists token 'a' at ids 0 and 2"):
        check_unique(["a", "b", "a"], "x")


def test_files_are_bounded_and_regular(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_bytes(b"12345")
    assert read_bounded(file, 5) == b"12345"
    with pytest.raises(CheckpointError, match="5 bytes, at most 4"):
        read_bounded(file, 4)
    with pytest.raises(CheckpointError, match="not a regular file"):
        read_bounded(tmp_path, 5)
    with pytest.raises(CheckpointError, match="Cannot read"):
        read_bounded(tmp_path / "missing", 5)


def test_a_huge_file_is_refused_before_it_is_read(tmp_path: Path) -> None:
    from slipstream.text.from_folder import load_tokenizer_folder

    with (tmp_path / "tokenizer.json").open("wb") as file:
        file.truncate(1 << 30)  # takes no space on disk
    with pytest.raises(CheckpointError, match="1,073,741,824 bytes, at most 209,715,200"):
        load_tokenizer_folder(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the OS has no named pipes")
def test_a_pipe_does_not_block_loading(tmp_path: Path) -> None:
    from slipstream.text.from_folder import load_tokenizer_folder

    os.mkfifo(tmp_path / "tokenizer.json")
    with pytest.raises(CheckpointError, match="not a regular file"):
        load_tokenizer_folder(tmp_path)
