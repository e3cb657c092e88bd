"""Does the listing name every row of the registries, with the true reason where a device is out of reach?"""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from slipstream.attention import registry as attention_registry
from slipstream.attention.base import AttentionCapability
from slipstream.checkpoint.gguf_types import BLOCK_TYPES
from slipstream.cli.models import find_obstacle, inventory
from slipstream.core.capability import Capability
from slipstream.core.registry import Registry
from slipstream.models.registry import ARCHITECTURES, GGUF_NAMES
from slipstream.quant.registry import SCHEMES
from tests.cli.conftest import Slipstream


def test_every_row_is_listed(slipstream: Slipstream) -> None:
    listed = slipstream("models")
    assert listed.code == 0 and listed.err == ""
    names = [*ARCHITECTURES, *GGUF_NAMES, *attention_registry.BACKENDS, "unquantized"]
    assert all(name in listed.out for name in [*names, *(block.name for block in BLOCK_TYPES.values())])


def test_json_says_the_same(slipstream: Slipstream) -> None:
    found = json.loads(slipstream("models", "--json").out)
    assert found == inventory()
    assert [row["name"] for row in found["architectures"]] == ARCHITECTURES.names()
    assert {"name": "LlamaForCausalLM", "gguf_names": ["llama"]} in found["architectures"]
    assert next(row["devices"]["cpu"] for row in found["attention_backends"] if row["name"] == "torch") == {
        "usable": True,
        "reason": "",
    }
    assert [row["name"] for row in found["quantization"]] == SCHEMES.names()


@dataclasses.dataclass(frozen=True)
class Row:
    capability: Any


def test_a_backend_out_of_reach_says_why(monkeypatch: pytest.MonkeyPatch, slipstream: Slipstream) -> None:
    rows: dict[str, Any] = {
        "fast": Row(AttentionCapability(devices=frozenset({"cuda"}), min_sm=90)),
        "absent": "slipstream.no_such_module:Backend",
    }
    registry = Registry("attention backend", {})
    for name, row in rows.items():
        registry.register(name, row)
    monkeypatch.setattr(attention_registry, "BACKENDS", registry)
    monkeypatch.setattr(attention_registry, "PREFERENCE", ("fast",))
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: False)
    fast, absent = json.loads(slipstream("models", "--json").out)["attention_backends"]
    assert not fast["usable"]
    assert fast["devices"]["cpu"]["reason"] == "it runs on cuda only"
    assert fast["devices"]["cuda"]["reason"] == "this torch is built without CUDA"
    assert not absent["usable"]
    assert absent["devices"]["cpu"]["reason"].startswith("it cannot be imported: No module named")
    assert "cpu: not usable: it runs on cuda only" in slipstream("models").out


@pytest.mark.parametrize(
    ("is_built", "has_device", "major", "minor", "reason"),
    [
        (False, False, 0, 0, "this torch is built without CUDA"),
        (True, False, 0, 0, "torch sees no CUDA device; look at nvidia-smi and CUDA_VISIBLE_DEVICES"),
        (True, True, 8, 6, "it needs compute capability 9.0, and this GPU has 8.6"),
        (True, True, 9, 0, ""),
        (True, True, 12, 0, ""),
    ],
)
def test_obstacles_of_a_gpu(
    monkeypatch: pytest.MonkeyPatch, is_built: bool, has_device: bool, major: int, minor: int, reason: str
) -> None:
    monkeypatch.setattr(torch.backends, "cuda", SimpleNamespace(is_built=lambda: is_built))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_device)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (major, minor))
    assert find_obstacle(Capability(min_sm=90), "cuda") == reason
