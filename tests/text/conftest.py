"""Tokenizers of the two test models, loaded once; conversions are cached in a folder of the test run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from slipstream.checkpoint.opening import open_checkpoint
from slipstream.text.from_gguf import load_tokenizer_gguf
from slipstream.text.tokenizer import FastTokenizer


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Keep the user's own cache out of the tests."""
    folder = tmp_path_factory.mktemp("cache")
    before = os.environ.get("SLIPSTREAM_CACHE")
    os.environ["SLIPSTREAM_CACHE"] = str(folder)
    yield folder
    if before is None:
        del os.environ["SLIPSTREAM_CACHE"]
    else:
        os.environ["SLIPSTREAM_CACHE"] = before


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
def gemma3(gemma3_metadata: dict[str, Any], cache_folder: Path) -> FastTokenizer:
    return load_tokenizer_gguf(gemma3_metadata)
