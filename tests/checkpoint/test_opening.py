"""One door: what is there decides, what was asked is kept, and everything else is refused by name."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from raw_gguf import U32, RawGguf, field, tensor, u32
from safetensors.torch import save_file

from slipstream.checkpoint import hub
from slipstream.checkpoint.opening import open_checkpoint
from slipstream.core.errors import CheckpointError, ConfigError, UnsupportedError

GGUF = RawGguf(fields=[field("n", U32, u32(7))], tensors=[tensor("t", (4,))], data=bytes(16)).to_bytes()


@pytest.fixture
def gguf_path(tmp_path: Path) -> Path:
    path = tmp_path / "only-gguf" / "model.gguf"
    path.parent.mkdir()
    path.write_bytes(GGUF)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "config.json").write_text(
        json.dumps({"model_type": "llama", "auto_map": {"AutoModel": "evil.M"}})
    )
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')")
    save_file({"w": torch.ones(2)}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("load_format", ["auto", "gguf"])
def test_a_gguf_file_and_a_folder_with_one_open(load_format: str, gguf_path: Path) -> None:
    for model in (gguf_path, str(gguf_path), gguf_path.parent):
        checkpoint = open_checkpoint(model, load_format=load_format)
        assert checkpoint.format == "gguf" and checkpoint.config == {"n": 7}
        assert checkpoint.path == gguf_path


@pytest.mark.parametrize("load_format", ["auto", "safetensors"])
def test_a_folder_opens_and_its_code_does_not_run(load_format: str, folder: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(folder, load_format=load_format)
    assert checkpoint.format == "hf" and checkpoint.tensor_names() == ["w"]
    assert not (tmp_path / "executed").exists()


def test_auto_prefers_safetensors_and_gguf_insists(folder: Path) -> None:
    (folder / "x.GGUF").write_bytes(GGUF)
    assert open_checkpoint(folder).format == "hf"
    assert open_checkpoint(folder, load_format="gguf").format == "gguf"


def test_a_gguf_file_of_another_name_needs_insisting(gguf_path: Path) -> None:
    blob = gguf_path.rename(gguf_path.with_name("2f3a9c"))
    with pytest.raises(CheckpointError, match=r"not named \.gguf.*load_format='gguf'"):
        open_checkpoint(blob)
    assert open_checkpoint(blob, load_format="gguf").format == "gguf"


def test_trust_is_refused_before_anything_is_looked_at() -> None:
    with pytest.raises(UnsupportedError, match=r"trust_remote_code=True: .*runs no code"):
        open_checkpoint("/no/such/model", trust_remote_code=True)


@pytest.mark.parametrize(
    ("load_format", "said"),
    [
        ("safetensor", "allowed: auto, safetensors, gguf, dummy. Did you mean 'safetensors'"),
        (None, "load_format=None is unknown"),
    ],
)
def test_load_formats_are_a_closed_set(load_format: Any, said: str, folder: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        open_checkpoint(folder, load_format=load_format)


@pytest.mark.parametrize("model", ["", None, 7, b"x", ["x"]], ids=repr)
def test_a_model_is_a_path_or_a_name(model: Any) -> None:
    with pytest.raises(ConfigError, match=r"give a \.gguf file"):
        open_checkpoint(model)


@pytest.mark.parametrize("name", ["absent.gguf", "a/b/c", "~no-such-user/x/y"])
def test_a_missing_path_is_said_to_be_missing(name: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        open_checkpoint(f"{tmp_path}/{name}" if name[0] != "~" else name)


@pytest.mark.parametrize("name", ["nul\0byte", "x" * 300, "x" * 10**6])
def test_an_impossible_path_is_an_error_of_ours(name: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(f"{tmp_path}/{name}")
    assert len(str(caught.value)) < 1000


@pytest.mark.timeout(10)
def test_fifos_and_devices_are_refused_unopened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.gguf")
    for path in (tmp_path / "x.gguf", Path("/dev/zero")):
        for load_format in ("auto", "gguf", "safetensors"):
            with pytest.raises(CheckpointError, match="neither a regular file nor a folder"):
                open_checkpoint(path, load_format=load_format)
    (tmp_path / "sub").mkdir()
    os.mkfifo(tmp_path / "sub" / "x.gguf")
    with pytest.raises(CheckpointError, match="is a FIFO"):
        open_checkpoint(tmp_path / "sub")


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth"])
def test_a_pickle_file_is_refused_with_advice(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"model{suffix}"
    path.write_bytes(b"x")
    for load_format in ("auto", "safetensors", "gguf"):
        with pytest.raises(CheckpointError, match=r"run code when opened.*Convert the model to safetensors"):
            open_checkpoint(path, load_format=load_format)


def test_a_safetensors_file_is_answered_with_its_folder(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="give the folder"):
        open_checkpoint(folder / "model.safetensors")


def test_folders_that_leave_a_choice_or_none_are_refused(
    gguf_path: Path, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=r"holds no \.gguf file"):
        open_checkpoint(folder, load_format="gguf")
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        open_checkpoint(gguf_path.parent, load_format="safetensors")
    (gguf_path.parent / "second.gguf").write_bytes(GGUF)
    with pytest.raises(CheckpointError, match=r"holds 2 GGUF files \(model\.gguf, second\.gguf"):
        open_checkpoint(gguf_path.parent)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        open_checkpoint(tmp_path / "empty")


def test_a_revision_is_for_hub_ids(folder: Path, gguf_path: Path) -> None:
    for model in (folder, gguf_path):
        with pytest.raises(ConfigError, match="revision='v1' is for hub ids"):
            open_checkpoint(model, revision="v1")


def test_a_hub_id_is_downloaded_at_its_revision(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str | None]] = []

    def download(model: str, *, revision: str | None) -> Path:
        asked.append((model, revision))
        return folder

    monkeypatch.setattr(hub, "download", download)
    assert open_checkpoint("org/name", revision="v1").tensor_names() == ["w"]
    assert asked == [("org/name", "v1")]
    with pytest.raises(UnsupportedError, match="Download one and give its path"):
        open_checkpoint("org/name", load_format="gguf")
    assert len(asked) == 1


def test_a_local_folder_wins_over_a_hub_id(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent.parent)
    relative = f"{folder.parent.name}/{folder.name}"
    assert hub.is_hub_id(relative)
    assert open_checkpoint(relative).path == Path(relative)


def test_a_tilde_is_the_home(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    assert open_checkpoint("~/hf").tensor_names() == ["w"]
