"""A folder opens whole or not at all, and nothing outside it is touched."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from slipstream.checkpoint.huggingface_folder import HuggingFaceFolder, resolve_member
from slipstream.core.errors import CheckpointError

CONFIG = {"model_type": "llama", "hidden_size": 8}
INDEX = "model.safetensors.index.json"
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


def make(folder: Path, shards: dict[str, list[str]], *, config: Any = CONFIG) -> Path:
    """Write tensors 0, 1, ... of ones times their number, by shard."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    for shard, names in shards.items():
        save_file({name: torch.full((2, 2), float(name)) for name in names}, folder / shard)
    return folder


def make_sharded(folder: Path, weight_map: Any = None) -> Path:
    make(folder, {SHARDS[0]: ["0", "1"], SHARDS[1]: ["2"]})
    default = {"0": SHARDS[0], "1": SHARDS[0], "2": SHARDS[1]}
    index = {"metadata": {"total_size": 48}, "weight_map": default if weight_map is None else weight_map}
    (folder / INDEX).write_text(json.dumps(index))
    return folder


def values(folder: HuggingFaceFolder) -> dict[str, float]:
    return {tensor.name: tensor.read_all()[0, 0].item() for tensor in folder.tensors()}


def num_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("name", ["model.safetensors", "weights.safetensors"])
def test_a_single_file_opens_under_any_name(name: str, tmp_path: Path) -> None:
    checkpoint = HuggingFaceFolder(make(tmp_path, {name: ["0", "1"]}))
    assert checkpoint.format == "hf" and checkpoint.path == tmp_path and checkpoint.config == CONFIG
    assert checkpoint.generation_config == {}
    assert sorted(checkpoint.tensor_names()) == ["0", "1"] and values(checkpoint) == {"0": 0.0, "1": 1.0}


def test_shards_open_through_their_index_and_close(tmp_path: Path) -> None:
    before = num_descriptors()
    checkpoint = HuggingFaceFolder(make_sharded(tmp_path))
    assert sorted(checkpoint.tensor_names()) == ["0", "1", "2"]
    assert values(checkpoint) == {"0": 0.0, "1": 1.0, "2": 2.0}
    assert num_descriptors() == before + 2
    checkpoint.close()
    assert num_descriptors() == before


def test_a_complete_file_wins_over_an_index(tmp_path: Path) -> None:
    make_sharded(tmp_path)
    assert HuggingFaceFolder(make(tmp_path, {"model.safetensors": ["7"]})).tensor_names() == ["7"]


def test_generation_config_is_read(tmp_path: Path) -> None:
    make(tmp_path, {"model.safetensors": ["0"]})
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.6}')
    assert HuggingFaceFolder(tmp_path).generation_config == {"temperature": 0.6}
    (tmp_path / "generation_config.json").write_text("[")
    with pytest.raises(CheckpointError, match=r"generation_config\.json.*not valid JSON"):
        HuggingFaceFolder(tmp_path)


@pytest.mark.parametrize(
    "shard",
    [
        *(
            "../out.safetensors",
            "sub/out.safetensors",
            "/tmp/out.safetensors",
            "..",
            ".",
            "",
            "a\\b.safetensors",
        ),
        *("nul\0.safetensors", "model.bin", 7, None, ["x.safetensors"]),
    ],
    ids=repr,
)
def test_a_shard_name_is_a_plain_file_name(shard: Any, tmp_path: Path) -> None:
    folder = make_sharded(tmp_path / "model", {"0": SHARDS[0], "1": SHARDS[0], "2": shard})
    make(tmp_path, {"out.safetensors": ["2"]})
    make(folder / "sub", {"out.safetensors": ["2"]})
    before = num_descriptors()
    with pytest.raises(
        CheckpointError, match=r"model.*(allowed: a plain name|needed: the name of a \.safetensors)"
    ):
        HuggingFaceFolder(folder)
    assert num_descriptors() == before


@pytest.mark.parametrize("weight_map", [{}, [], "x", 3], ids=repr)
def test_an_index_needs_a_map(weight_map: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"{INDEX}: weight_map is"):
        HuggingFaceFolder(make_sharded(tmp_path, weight_map))


def test_an_index_that_repeats_a_tensor_is_refused(tmp_path: Path) -> None:
    make_sharded(tmp_path)
    (tmp_path / INDEX).write_text(f'{{"weight_map": {{"0": "{SHARDS[0]}", "0": "{SHARDS[1]}"}}}}')
    with pytest.raises(CheckpointError, match="'0' appears twice"):
        HuggingFaceFolder(tmp_path)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    (make_sharded(tmp_path) / SHARDS[1]).unlink()
    with pytest.raises(CheckpointError, match=f"{SHARDS[1]} is missing"):
        HuggingFaceFolder(tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    make_sharded(tmp_path)
    make(tmp_path, {SHARDS[1]: ["1", "2"]})
    with pytest.raises(CheckpointError, match=f"'1' is in both {SHARDS[0]} and {SHARDS[1]}"):
        HuggingFaceFolder(tmp_path)


@pytest.mark.parametrize(
    ("weight_map", "said"),
    [
        ({"0": SHARDS[0], "9": SHARDS[1]}, f"'9' should be in {SHARDS[1]} and is in no file"),
        (
            {"0": SHARDS[1], "2": SHARDS[1], "1": SHARDS[0]},
            f"'0' should be in {SHARDS[1]} and is in {SHARDS[0]}",
        ),
    ],
)
def test_an_index_that_disagrees_with_its_shards_is_refused(
    weight_map: Any, said: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=said):
        HuggingFaceFolder(make_sharded(tmp_path, weight_map))


def test_a_damaged_shard_is_named_and_the_others_are_closed(tmp_path: Path) -> None:
    os.truncate(make_sharded(tmp_path) / SHARDS[1], 50)
    before = num_descriptors()
    with pytest.raises(CheckpointError, match=SHARDS[1]):
        HuggingFaceFolder(tmp_path)
    assert num_descriptors() == before


def test_the_hub_cache_layout_opens(tmp_path: Path) -> None:
    snapshot, blobs = (
        tmp_path / "models--org--name" / "snapshots" / "abc123",
        tmp_path / "models--org--name" / "blobs",
    )
    make_sharded(snapshot)
    blobs.mkdir()
    for index, path in enumerate(sorted(snapshot.iterdir())):
        path.rename(blobs / f"hash{index}")
        path.symlink_to(Path("..") / ".." / "blobs" / f"hash{index}")
    link = tmp_path / "link"
    link.symlink_to(snapshot)
    for folder in (snapshot, link):
        assert values(HuggingFaceFolder(folder)) == {"0": 0.0, "1": 1.0, "2": 2.0}
    # Messages name the file as the user knows it, not by its hash.
    os.truncate(blobs / sorted(os.listdir(blobs))[1], 50)
    with pytest.raises(CheckpointError, match=SHARDS[0]):
        HuggingFaceFolder(snapshot)


@pytest.mark.parametrize("member", ["config.json", "generation_config.json", INDEX, SHARDS[0]])
@pytest.mark.parametrize("layout", ["plain", "hub"])
def test_a_link_out_of_the_folder_is_refused(member: str, layout: str, tmp_path: Path) -> None:
    folder = make_sharded(tmp_path / "snapshots" / "abc" if layout == "hub" else tmp_path / "model")
    (folder / "generation_config.json").write_text("{}")
    outside = tmp_path / "outside"
    (folder / member).rename(outside)
    (folder / member).symlink_to(outside)
    with pytest.raises(CheckpointError, match=f"{member} is a link to {outside}, outside"):
        HuggingFaceFolder(folder)


def test_a_link_inside_the_folder_is_followed(tmp_path: Path) -> None:
    make(tmp_path, {"real": ["4"]})
    (tmp_path / "model.safetensors").symlink_to("real")
    assert values(HuggingFaceFolder(tmp_path)) == {"4": 4.0}


@pytest.mark.parametrize("member", ["config.json", "generation_config.json", "model.safetensors"])
def test_a_link_to_nothing_or_to_itself_is_missing(member: str, tmp_path: Path) -> None:
    folder = make(tmp_path, {"model.safetensors": ["0"]})
    for target in ("nowhere", member):
        (folder / member).unlink(missing_ok=True)
        (folder / member).symlink_to(target)
        with pytest.raises(CheckpointError, match=f"{member} is missing"):
            HuggingFaceFolder(folder)


@pytest.mark.timeout(10)
@pytest.mark.parametrize("member", ["config.json", "generation_config.json", "model.safetensors", INDEX])
@pytest.mark.parametrize("kind", ["fifo", "folder"])
def test_members_are_regular_files(member: str, kind: str, tmp_path: Path) -> None:
    make(tmp_path, {} if member == INDEX else {"model.safetensors": ["0"]})
    (tmp_path / member).unlink(missing_ok=True)
    os.mkfifo(tmp_path / member) if kind == "fifo" else (tmp_path / member).mkdir()
    with pytest.raises(CheckpointError, match=f"{member}: is a .*regular file"):
        HuggingFaceFolder(tmp_path)


class Payload:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth"])
def test_pickles_are_refused_with_advice_and_never_opened(name: str, tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    folder = make(tmp_path / "model", {})
    (folder / name).write_bytes(pickle.dumps(Payload(marker)))
    with pytest.raises(CheckpointError, match=f"only as {name}.*[Cc]onvert.*safetensors"):
        HuggingFaceFolder(folder)
    assert not marker.exists()
    pickle.loads((folder / name).read_bytes())
    assert marker.exists(), "the payload would have shown"


def test_a_folder_without_weights_or_config_says_what_is_needed(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        HuggingFaceFolder(tmp_path)
    with pytest.raises(CheckpointError, match=r"holds no weights\. Needed: model\.safetensors"):
        HuggingFaceFolder(make(tmp_path, {}))
    with pytest.raises(CheckpointError, match="holds 2 safetensors files"):
        HuggingFaceFolder(make(tmp_path, {"a.safetensors": ["0"], "b.safetensors": ["1"]}))


def test_resolve_member_refuses_every_way_out(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    folder = make(tmp_path / "model", {"model.safetensors": ["0"]})
    assert resolve_member(folder, "config.json") == folder.resolve() / "config.json"
    for name in ("../file", "..", ".", "", "model/../../file", str(tmp_path / "file"), "a\0b", "..\\file"):
        with pytest.raises(CheckpointError, match="plain name"):
            resolve_member(folder, name)
