"""What does a bug report need to say of a machine? `slipstream collect-env [--json]`.

Invariant: no secret and no name of a user is shown. Variables come from a fixed list, or carry our prefix;
the value of one that may be a secret is left out (`core.env.describe_variables`). Nothing leaves the machine.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from slipstream.cli.sizes import show_bytes
from slipstream.core import env

PACKAGES = (
    *("slipstream-llm", "torch", "numpy", "msgspec", "safetensors", "tokenizers", "jinja2"),
    *("huggingface-hub", "typer", "rich", "psutil", "pyyaml"),
    # Optional, or what a CUDA build of torch brings.
    *("transformers", "triton", "flashinfer-python", "nvidia-cublas-cu12", "nvidia-cudnn-cu12"),
    *("nvidia-nccl-cu12", "nvidia-nccl-cu13"),
)
# Those that kernels for CPUs ask for, as Linux spells them; macOS and Windows do not tell.
INSTRUCTION_SETS = (
    *("avx", "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512vl", "avx512_vnni"),
    *("avx512_bf16", "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16"),
    *("asimd", "asimddp", "fphp", "bf16", "i8mm", "sve", "sve2"),
)
CPUINFO = Path("/proc/cpuinfo")
CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")
MEMORY_LIMIT = Path("/sys/fs/cgroup/memory.max")
DRIVER = Path("/proc/driver/nvidia/version")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CollectEnvJob:
    """One report to print."""

    as_json: bool

    def __call__(self) -> None:
        report = collect()
        if self.as_json:
            print(json.dumps(report, indent=1))
            return
        for line in describe(report):
            print(line)


def collect() -> dict[str, Any]:
    from slipstream import __version__

    return {
        "slipstream": __version__,
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "os": platform.platform(),
        "cpu": cpu_facts(),
        "memory": memory_facts(),
        "torch": torch_facts(),
        "gpus": gpu_facts(),
        "packages": package_versions(),
        "environment": env.describe_variables(),
    }


def cpu_facts() -> dict[str, Any]:
    import psutil

    fields = cpuinfo_fields(read_text(CPUINFO))
    flags = set(fields.get("flags", fields.get("Features", "")).split())
    usable = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    return {
        "model": fields.get("model name") or platform.processor() or "unknown",
        "architecture": platform.machine(),
        "physical_cores": psutil.cpu_count(logical=False),
        "logical_cores": psutil.cpu_count(),
        "usable_cores": usable,
        "quota_cores": quota_cores(read_text(CPU_QUOTA)),
        "instruction_sets": [name for name in INSTRUCTION_SETS if name in flags],
    }


def cpuinfo_fields(text: str) -> dict[str, str]:
    """Return the fields of the first processor of /proc/cpuinfo."""
    lines = (line.partition(":") for line in text.partition("\n\n")[0].splitlines())
    return {name.strip(): value.strip() for name, _, value in lines}


def quota_cores(text: str) -> float | None:
    """Return what a control group allows ("150000 100000" is 1.5 cores), or None without a bound."""
    parts = text.split()
    if len(parts) != 2 or parts[0] == "max":
        return None
    return int(parts[0]) / int(parts[1])


def memory_facts() -> dict[str, Any]:
    import psutil

    memory, limit = psutil.virtual_memory(), read_text(MEMORY_LIMIT).strip()
    return {
        "total_bytes": memory.total,
        "available_bytes": memory.available,
        "limit_bytes": int(limit) if limit.isdigit() else None,
    }


def torch_facts() -> dict[str, Any]:
    """Return how torch is built, or why it cannot be imported, which is what a report may be about."""
    try:
        import torch
    except (ImportError, OSError) as error:
        return {"error": f"torch cannot be imported: {error}", "driver": driver_version(read_text(DRIVER))}
    return {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "mkldnn": torch.backends.mkldnn.is_available(),
        "driver": driver_version(read_text(DRIVER)),
    }


def driver_version(text: str) -> str | None:
    """Return 580.65.06 from "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  ..."."""
    words = (word for word in text.partition("\n")[0].split() if word[0].isdigit() and "." in word)
    return next(words, None)


def gpu_facts() -> list[dict[str, Any]]:
    try:
        import torch
    except (ImportError, OSError):
        return []
    if not torch.cuda.is_available():
        return []
    return [
        {
            "name": properties.name,
            "memory_bytes": properties.total_memory,
            "compute_capability": f"{properties.major}.{properties.minor}",
        }
        for properties in map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    ]


def package_versions() -> dict[str, str]:
    """Return the versions of those packages that are installed."""
    versions: dict[str, str] = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def read_text(path: Path) -> str:
    """Return a small file of the kernel's, or nothing where there is none."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def describe(report: dict[str, Any]) -> Iterator[str]:
    """Yield the report as lines for people."""
    for name, value in report.items():
        if isinstance(value, dict):
            yield f"{name}:"
            yield from (f"  {key}: {shown(key, inner)}" for key, inner in value.items())
        elif isinstance(value, list):
            yield f"{name}: " + ("" if value else "none")
            yield from ("  " + ", ".join(shown(*item) for item in entry.items()) for entry in value)
        else:
            yield f"{name}: {value}"


def shown(key: str, value: Any) -> str:
    if key.endswith("_bytes") and value is not None:
        return show_bytes(value)
    if isinstance(value, list):
        return " ".join(value) or "unknown"
    return "none" if value is None else str(value)


def collect_env(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> CollectEnvJob:
    """Describe this machine for a bug report: versions, CPU, memory, GPUs, variables. No secrets."""
    return CollectEnvJob(as_json=as_json)
