"""Tokenizers of the two test models, loaded once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from slipstream.checkpoint.opening import open_checkpoint
from slipstream.text.from_gguf import load_tokenizer_gguf
from slipstream.text.tokenizer import FastTokenizer


def metadata_of(path: Path) -> dict[str, Any]:
    checkpoint = open_checkpoint(path)
    try:
        return dict(checkpoint.config)
    finally:
        checkpoint.close()


@pytest.fixture(scope="session")
def smollm2_metadata(smollm2_path: Path) -> dict[str, Any]:
    return metadata_of(smollm2_path)


@pytest.fixture(scope="session")
def gemma3_metadata(gemma3_path: Path) -> dict[str, Any]:
    return metadata_of(gemma3_path)


@pytest.fixture(scope="session")
def smollm2(smollm2_metadata: dict[str, Any]) -> FastTokenizer:
    return load_tokenizer_gguf(smollm2_metadata)


@pytest.fixture(scope="session")
def gemma3(gemma3_metadata: dict[str, Any]) -> FastTokenizer:
    return load_tokenizer_gguf(gemma3_metadata)
