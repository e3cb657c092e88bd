"""What can this installation run, on this machine? `slipstream models [--json]`.

Architectures, ways in which weights are stored, and attention backends, each backend with the reason where
a device cannot use it. Nothing is guessed from names: registries list, capabilities and torch decide.
"""

from __future__ import annotations

import dataclasses
import json
import textwrap
from collections.abc import Iterator
from typing import Annotated, Any

import typer

DEVICES = ("cpu", "cuda")
WIDTH = 110


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelsJob:
    """One listing to print."""

    as_json: bool

    def __call__(self) -> None:
        if self.as_json:
            print(json.dumps(inventory(), indent=1))
            return
        for line in describe(inventory()):
            print(line)


def inventory() -> dict[str, Any]:
    return {
        "architectures": architectures(),
        "quantization": quantization_schemes(),
        "gguf_types": gguf_types(),
        "attention_backends": attention_backends(),
    }


def architectures() -> list[dict[str, Any]]:
    """Return each architecture by its name in config.json, with the names GGUF files give it."""
    from slipstream.models.registry import ARCHITECTURES, GGUF_NAMES

    return [
        {"name": name, "gguf_names": [gguf for gguf, ours in GGUF_NAMES.items() if ours == name]}
        for name in ARCHITECTURES
    ]


def quantization_schemes() -> list[dict[str, Any]]:
    """Return how linear layers may store their weights on a device, with the types they compute in."""
    from slipstream.quant.registry import SCHEMES

    rows = []
    for name in SCHEMES:
        capability, obstacles = inspect_row(SCHEMES, name)
        dtypes = sorted(capability.activation_dtypes) if capability is not None else []
        rows.append({"name": name, "activation_dtypes": dtypes, **usable(obstacles)})
    return rows


def gguf_types() -> dict[str, list[str]]:
    """Return the tensor types of GGUF files that are read (and dequantised), and those that are not."""
    from slipstream.checkpoint.gguf_types import BLOCK_TYPES, UNREAD_TYPES

    return {
        "read": [block.name for block in BLOCK_TYPES.values()],
        "not_read": [UNREAD_TYPES[number] for number in sorted(UNREAD_TYPES)],
    }


def attention_backends() -> list[dict[str, Any]]:
    """Return each backend, best first, with why a device of this machine cannot use it."""
    from slipstream.attention.registry import BACKENDS, PREFERENCE

    names = [*PREFERENCE, *(name for name in BACKENDS if name not in PREFERENCE)]
    return [{"name": name, **usable(inspect_row(BACKENDS, name)[1])} for name in names]


def usable(obstacles: dict[str, str]) -> dict[str, Any]:
    return {
        "usable": not all(obstacles.values()),
        "devices": {device: {"usable": not reason, "reason": reason} for device, reason in obstacles.items()},
    }


def inspect_row(registry: Any, name: str) -> tuple[Any, dict[str, str]]:
    """Return a row's capability (None where it cannot be imported) and the obstacle on each device."""
    try:
        capability = registry.get(name).capability
    except ImportError as error:
        reason = f"it cannot be imported: {error}"
        return None, dict.fromkeys(DEVICES, reason)
    return capability, {device: find_obstacle(capability, device) for device in DEVICES}


def find_obstacle(capability: Any, device: str) -> str:
    """Return why this machine's `device` cannot use what has `capability`; empty where it can."""
    if device not in capability.devices:
        return f"it runs on {', '.join(sorted(capability.devices))} only"
    if device != "cuda":
        return ""
    import torch

    if not torch.backends.cuda.is_built():
        return "this torch is built without CUDA"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device; look at nvidia-smi and CUDA_VISIBLE_DEVICES"
    major, minor = torch.cuda.get_device_capability()
    if major * 10 + minor < capability.min_sm:
        needed = f"{capability.min_sm // 10}.{capability.min_sm % 10}"
        return f"it needs compute capability {needed}, and this GPU has {major}.{minor}"
    return ""


def describe(found: dict[str, Any]) -> Iterator[str]:
    """Yield the listing as lines for people."""
    yield "Architectures (architectures in config.json; in brackets general.architecture of GGUF files)"
    for row in found["architectures"]:
        yield f"  {row['name']}" + (f" ({', '.join(row['gguf_names'])})" if row["gguf_names"] else "")
    yield "Quantization schemes"
    for row in found["quantization"]:
        yield f"  {row['name']}: computes in {', '.join(row['activation_dtypes']) or 'nothing here'}"
        yield from device_lines(row)
    yield "GGUF types"
    for label, key in (("read, and dequantised when loaded", "read"), ("not read", "not_read")):
        text = f"{label}: {', '.join(found['gguf_types'][key])}"
        yield from textwrap.wrap(text, WIDTH, initial_indent="  ", subsequent_indent="    ")
    yield "Attention backends (auto takes the first that serves the model)"
    for row in found["attention_backends"]:
        yield f"  {row['name']}"
        yield from device_lines(row)


def device_lines(row: dict[str, Any]) -> Iterator[str]:
    for device, state in row["devices"].items():
        yield f"    {device}: " + ("usable" if state["usable"] else f"not usable: {state['reason']}")


def models(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> ModelsJob:
    """List architectures, quantization schemes and attention backends, as usable on this machine."""
    return ModelsJob(as_json=as_json)
