"""What does a model folder offer without its weights? Its configuration, for random weights.

Invariant: only JSON is opened; whatever weights lie beside `config.json` are neither read nor checked.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from slipstream.checkpoint.base import Format, WeightTensor
from slipstream.checkpoint.huggingface_folder import read_defaults, read_folder_json

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)


class DummyCheckpoint:
    """A folder with at least a config.json; it has no tensors, and who loads it makes them up."""

    format: Format = "hf"

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config: dict[str, Any] = read_folder_json(self.path, "config.json")
        self.generation_config: dict[str, Any] = read_defaults(self.path)

    def has_tokenizer(self) -> bool:
        """Say whether the folder holds a tokenizer; without one, prompts are token ids."""
        return any((self.path / name).exists() for name in TOKENIZER_FILES)

    def tensor_names(self) -> list[str]:
        return []

    def tensors(self) -> Iterator[WeightTensor]:
        yield from ()

    def close(self) -> None:
        """Nothing is held open."""
