"""A folder with nothing but a configuration opens, and nothing else in it is touched."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from raw_gguf import RawGguf

from slipstream.checkpoint import hub
from slipstream.checkpoint.dummy import TOKENIZER_FILES, DummyCheckpoint
from slipstream.checkpoint.opening import open_checkpoint
from slipstream.core.errors import CheckpointError, UnsupportedError

CONFIG = {"architectures": ["SomeForCausalLM"], "vocab_size": 7}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "config-only"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def test_a_configuration_is_enough(folder: Path) -> None:
    checkpoint = open_checkpoint(folder, load_format="dummy")
    assert isinstance(checkpoint, DummyCheckpoint) and checkpoint.format == "hf"
    assert (checkpoint.config, checkpoint.generation_config) == (CONFIG, {})
    assert checkpoint.tensor_names() == [] and list(checkpoint.tensors()) == []
    (folder / "generation_config.json").write_text('{"eos_token_id": 3}')
    assert open_checkpoint(folder, load_format="dummy").generation_config == {"eos_token_id": 3}
    checkpoint.close()


def test_weights_beside_it_are_not_looked_at(folder: Path) -> None:
    # A FIFO would block whoever opens it; an index that is no JSON would be refused.
    os.mkfifo(folder / "model.safetensors")
    (folder / "model.safetensors.index.json").write_text("{")
    (folder / "x.gguf").write_bytes(RawGguf().to_bytes())
    assert open_checkpoint(folder, load_format="dummy").config == CONFIG


@pytest.mark.parametrize("name", TOKENIZER_FILES)
def test_a_tokenizer_is_noticed(folder: Path, name: str) -> None:
    checkpoint = DummyCheckpoint(folder)
    assert not checkpoint.has_tokenizer()
    (folder / name).write_text("{}")
    assert checkpoint.has_tokenizer()


@pytest.mark.parametrize("name", ["model.gguf", "model.safetensors", "other"])
def test_a_file_is_refused_by_name(folder: Path, name: str) -> None:
    path = folder / name
    path.write_bytes(RawGguf().to_bytes())
    with pytest.raises(UnsupportedError, match=rf"'dummy' with the file .*{name}.*folder that holds one"):
        open_checkpoint(path, load_format="dummy")


def test_a_folder_without_a_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        open_checkpoint(tmp_path, load_format="dummy")


def test_a_hub_id_is_fetched_without_its_weights(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def download(model: str, *, revision: str | None, with_weights: bool) -> Path:
        asked.append(with_weights)
        return folder

    monkeypatch.setattr(hub, "download", download)
    assert open_checkpoint("org/name", load_format="dummy").config == CONFIG
    assert asked == [False]
