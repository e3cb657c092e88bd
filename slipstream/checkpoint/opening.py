"""Which reader opens this model? The only door to model files: it decides by what is there, and owns trust.

Invariant: what is opened is a .gguf file or safetensors, never a pickle, never code from a repository.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from slipstream.checkpoint import hub
from slipstream.checkpoint.base import Checkpoint
from slipstream.checkpoint.dummy import DummyCheckpoint
from slipstream.checkpoint.gguf import GgufCheckpoint
from slipstream.checkpoint.huggingface_folder import PICKLE_SUFFIXES, HuggingFaceFolder
from slipstream.checkpoint.weight_file import shown
from slipstream.core.errors import CheckpointError, ConfigError, UnsupportedError, nearest

LOAD_FORMATS = ("auto", "safetensors", "gguf", "dummy")


def open_checkpoint(
    model: str | Path,
    *,
    load_format: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Checkpoint:
    """Open a .gguf file, a folder with config.json and safetensors, a folder with one .gguf, or a hub id.

    `load_format="auto"` takes what is there, safetensors before GGUF; "safetensors" and "gguf" insist, and
    "dummy" reads the config.json of a folder or hub id alone, for random weights.
    `revision` is for hub ids. Every header is checked before this returns; weights are read later, by rows.
    Raises CheckpointError for the files, ConfigError for the arguments.
    """
    _check_options(model, load_format, trust_remote_code=trust_remote_code)
    path = Path(os.path.expanduser(model))
    kind = _kind(path, model)
    if kind == "missing":
        return _open_hub(str(model), load_format=load_format, revision=revision)
    if revision is not None:
        raise ConfigError(
            f"revision={revision!r} is for hub ids; {path} is a local path. Leave revision out."
        )
    if kind == "folder":
        return _open_folder(path, load_format=load_format)
    return _open_file(path, load_format=load_format)


def _check_options(model: str | Path, load_format: str, *, trust_remote_code: bool) -> None:
    if not isinstance(model, (str, Path)) or not str(model):
        raise ConfigError(
            f"model={model!r}: give a .gguf file, a model folder or a hub id such as 'org/name'."
        )
    if load_format not in LOAD_FORMATS:
        raise ConfigError(
            f"load_format={load_format!r} is unknown; allowed: {', '.join(LOAD_FORMATS)}."
            f"{nearest(str(load_format), LOAD_FORMATS)}"
        )
    if trust_remote_code:
        raise UnsupportedError(
            "trust_remote_code=True: Slipstream runs no code from a model repository. Leave it out: the "
            "architectures it serves need none, and a model that has only its own code cannot be served."
        )


def _kind(path: Path, model: str | Path) -> str:
    """Return "file", "folder" or "missing"; refuse everything else without opening it."""
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return "missing"
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{shown(str(model))} cannot be opened: {_reason(error)}. Check the path."
        ) from error
    if stat.S_ISDIR(mode):
        return "folder"
    if stat.S_ISREG(mode):
        return "file"
    raise CheckpointError(
        f"{path}: is neither a regular file nor a folder. Give a .gguf file or a model folder."
    )


def _reason(error: Exception) -> str:
    # The text of an OSError repeats the path, which may be a megabyte long.
    return getattr(error, "strerror", None) or str(error)


def _open_hub(model: str, *, load_format: str, revision: str | None) -> Checkpoint:
    if not hub.is_hub_id(model):
        raise CheckpointError(
            f"{shown(model)} does not exist. Give a .gguf file, a folder with config.json and safetensors, "
            "or a hub id such as 'org/name'."
        )
    if load_format == "gguf":
        raise UnsupportedError(
            f"load_format='gguf' with the hub id {model!r}: a repository may hold many GGUF files. Download "
            "one and give its path."
        )
    if load_format == "dummy":
        return DummyCheckpoint(hub.download(model, revision=revision, with_weights=False))
    return HuggingFaceFolder(hub.download(model, revision=revision))


def _open_file(path: Path, *, load_format: str) -> Checkpoint:
    suffix = path.suffix.lower()
    if load_format == "dummy":
        raise UnsupportedError(
            f"load_format='dummy' with the file {path}: random weights are made from a config.json, which a "
            "GGUF or safetensors file is not. Give a folder that holds one, or load the file with "
            "load_format='auto'."
        )
    if suffix in PICKLE_SUFFIXES:
        raise CheckpointError(
            f"{path}: {suffix} files run code when opened, so they are not read. Convert the model to "
            "safetensors."
        )
    if load_format == "safetensors" or suffix == ".safetensors":
        raise CheckpointError(
            f"{path}: is a file; give the folder that holds the safetensors and config.json."
        )
    if suffix != ".gguf" and load_format != "gguf":
        raise CheckpointError(
            f"{path}: is not named .gguf. Give a .gguf file or a model folder; load_format='gguf' insists."
        )
    return GgufCheckpoint(path)


def _open_folder(path: Path, *, load_format: str) -> Checkpoint:
    if load_format == "dummy":
        return DummyCheckpoint(path)
    try:
        names = sorted(os.listdir(path))
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be listed: {_reason(error)}. Check its permissions."
        ) from error
    gguf_files = [name for name in names if name.lower().endswith(".gguf")]
    has_safetensors = any(name.endswith((".safetensors", ".safetensors.index.json")) for name in names)
    if load_format == "safetensors" or (has_safetensors and load_format == "auto"):
        return HuggingFaceFolder(path)
    if len(gguf_files) == 1:
        return GgufCheckpoint(path / gguf_files[0])
    if gguf_files:
        raise CheckpointError(
            f"{path}: holds {len(gguf_files)} GGUF files ({', '.join(gguf_files[:4])}...). Give the path of "
            "one."
        )
    if load_format == "gguf":
        raise CheckpointError(f"{path}: holds no .gguf file. Give the path of one, or load_format='auto'.")
    return HuggingFaceFolder(path)
