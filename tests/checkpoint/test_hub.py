"""A hub id becomes a local folder of configuration, tokenizer and safetensors, or one clear error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.utils import filter_repo_objects

from slipstream.checkpoint import hub
from slipstream.core.errors import CheckpointError


@pytest.mark.parametrize(
    ("model", "is_id"),
    [("org/name", True), ("HuggingFaceTB/SmolLM2-135M-Instruct", True), ("a/b.c_d-1", True)]
    + [
        (name, False)
        for name in ("name", "/org/name", "./org", "../x", "a/b/c", "a/", "", "a/b\n", "a b/c", "~/m")
    ],
)
def test_hub_ids_are_two_plain_names(model: str, is_id: bool) -> None:
    assert hub.is_hub_id(model) is is_id


def test_only_configuration_tokenizer_and_safetensors_are_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[dict[str, Any]] = []

    def snapshot_download(repo_id: str, **arguments: Any) -> str:
        calls.append({"repo_id": repo_id, **arguments})
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert hub.download("org/name", revision="v1") == tmp_path
    hub.download("org/name", revision="v1", with_weights=False)
    call, without_weights = calls
    assert call["repo_id"] == "org/name" and call["revision"] == "v1"
    wanted = ["config.json", "generation_config.json", "model-00001-of-00002.safetensors", "tokenizer.json"]
    wanted += [
        "model.safetensors.index.json",
        "tokenizer.model",
        "merges.txt",
        "vocab.txt",
        "chat_template.jinja",
    ]
    unwanted = [
        "pytorch_model.bin",
        "model.pt",
        "modeling_x.py",
        "x.gguf",
        "README.md",
        "consolidated.safetensors",
    ]
    unwanted += [
        "original/consolidated.00.pth",
        "onnx/model.onnx",
        "fp16/model.safetensors",
        "flax_model.msgpack",
    ]
    kept = filter_repo_objects(
        wanted + unwanted, allow_patterns=call["allow_patterns"], ignore_patterns=call["ignore_patterns"]
    )
    assert list(kept) == wanted
    kept = filter_repo_objects(wanted + unwanted, allow_patterns=without_weights["allow_patterns"])
    assert list(kept) == [name for name in wanted if not name.endswith(".safetensors")]


@pytest.mark.parametrize(
    "error", [OSError("no route"), ValueError("bad id"), RuntimeError(""), KeyError("x")]
)
def test_every_failure_says_what_was_tried_and_what_to_do(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def snapshot_download(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(
        CheckpointError, match=rf"org/name.*revision main.*{type(error).__name__}.*downloaded folder"
    ):
        hub.download("org/name", revision=None)


def test_offline_is_an_error_without_a_network_access(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match=r"slipstream-tests/no-such-model.*could not be fetched"):
        hub.download("slipstream-tests/no-such-model", revision=None)
