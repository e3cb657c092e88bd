"""What does a Hugging Face folder offer? Its configuration, and safetensors in one file or in shards.

Invariants: no file outside the folder is opened (the hub cache's links from `snapshots/<revision>` into the
`blobs` folder beside it are the one exception); every shard's header is checked, and the shards against the
index, before a weight is read; weights in pickle formats and code in the repository are never opened.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from slipstream.checkpoint.base import Format, WeightTensor
from slipstream.checkpoint.json_file import MAX_CONFIG_BYTES, MAX_INDEX_BYTES, read_json_object
from slipstream.checkpoint.safetensors_reader import SafetensorsFile
from slipstream.checkpoint.weight_file import damaged, shown
from slipstream.core.errors import CheckpointError

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth")


class HuggingFaceFolder:
    """An open folder. `config` is its config.json; `auto_map` in it is carried along and never followed."""

    format: Format = "hf"

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = read_folder_json(self.path, "config.json")
        self.generation_config = read_defaults(self.path)
        index = self._read_index()
        names = list(dict.fromkeys(index.values())) if index else [_single_name(self.path)]
        self._shards: dict[str, SafetensorsFile] = {}
        try:
            # All paths before the first open: a bad name in an index must not leave half a model open.
            for name, resolved in [(name, resolve_member(self.path, name)) for name in names]:
                self._shards[name] = SafetensorsFile(resolved, label=self.path / name)
            self._check_shards(index)
        except BaseException:
            self.close()
            raise

    def tensor_names(self) -> list[str]:
        return [name for shard in self._shards.values() for name in shard.tensor_names()]

    def tensors(self) -> Iterator[WeightTensor]:
        """Yield every tensor once, in file order."""
        for shard in self._shards.values():
            yield from shard.tensors()

    def close(self) -> None:
        for shard in self._shards.values():
            shard.close()

    def _read_index(self) -> dict[str, str]:
        """Return tensor name -> shard name, or {} where the model is one file."""
        # As transformers does it: a complete model.safetensors wins over an index beside it.
        if _has(self.path, _SINGLE) or not _has(self.path, _INDEX):
            return {}
        path, label = resolve_member(self.path, _INDEX), self.path / _INDEX
        index = read_json_object(path, max_bytes=MAX_INDEX_BYTES, label=label, unique_keys=True)
        weight_map = index.get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise damaged(label, f"weight_map is {shown(weight_map)}; needed: tensor names to file names")
        for tensor, shard in weight_map.items():
            if not isinstance(shard, str) or not shard.endswith(".safetensors"):
                raise damaged(
                    label,
                    f"tensor {shown(tensor)} is in {shown(shard)}; needed: the name of a .safetensors file",
                )
        return weight_map

    def _check_shards(self, index: dict[str, str]) -> None:
        homes: dict[str, str] = {}
        for shard, file in self._shards.items():
            for tensor in file.tensor_names():
                if tensor in homes:
                    raise damaged(self.path, f"tensor {shown(tensor)} is in both {homes[tensor]} and {shard}")
                homes[tensor] = shard
        for tensor, shard in index.items():
            if homes.get(tensor) != shard:
                found = homes.get(tensor, "no file")
                raise damaged(
                    self.path / _INDEX, f"tensor {shown(tensor)} should be in {shard} and is in {found}"
                )


def read_folder_json(folder: Path, name: str) -> dict[str, Any]:
    """Return the JSON object in a configuration file of `folder`."""
    path = resolve_member(folder, name)
    return read_json_object(path, max_bytes=MAX_CONFIG_BYTES, label=folder / name)


def read_defaults(folder: Path) -> dict[str, Any]:
    """Return `generation_config.json`, or {} where the folder has none."""
    name = "generation_config.json"
    return read_folder_json(folder, name) if _has(folder, name) else {}


def _has(folder: Path, name: str) -> bool:
    # A dangling link counts: passing over it would load another file than the one that was meant.
    return os.path.lexists(folder / name)


def resolve_member(folder: Path, name: str) -> Path:
    """Return the real path of a file of `folder`; raise CheckpointError where it lies outside or is missing.

    Inside is the folder itself and, in the hub's cache (`<repo>/snapshots/<revision>`), `<repo>/blobs`.
    """
    if not name or name in (".", "..") or any(char in name for char in "/\\\0"):
        raise damaged(folder, f"names the file {shown(name)}; allowed: a plain name inside the folder")
    root = folder.resolve()
    roots = [root]
    if root.parent.name == "snapshots":
        roots.append(root.parent.parent.resolve() / "blobs")
    try:
        resolved = (root / name).resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(
            f"{folder}: {name} is missing; the download is incomplete or this is no model folder. "
            "Download the model again."
        ) from error
    if not any(resolved.is_relative_to(allowed) for allowed in roots):
        raise CheckpointError(
            f"{folder}: {name} is a link to {resolved}, outside the model folder. Copy the file into it."
        )
    return resolved


def _single_name(folder: Path) -> str:
    """Return the name of the folder's only safetensors file."""
    if _has(folder, _SINGLE):
        return _SINGLE
    found = sorted(path.name for path in folder.glob("*.safetensors"))
    if len(found) == 1:
        return found[0]
    if found:
        raise CheckpointError(
            f"{folder}: holds {len(found)} safetensors files and neither {_SINGLE} nor {_INDEX} "
            f"({', '.join(found[:3])}...). Add the index or keep one file."
        )
    pickled = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLE_SUFFIXES)
    if pickled:
        raise CheckpointError(
            f"{folder}: holds weights only as {', '.join(pickled[:3])}. Such files run code when opened, so "
            "they are not read. Convert the model to safetensors (in transformers: "
            "model.save_pretrained(folder, safe_serialization=True)) or download a safetensors revision."
        )
    raise CheckpointError(
        f"{folder}: holds no weights. Needed: {_SINGLE}, or {_INDEX} with its shards. Download the model "
        "again."
    )
