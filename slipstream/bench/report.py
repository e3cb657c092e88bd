"""How are measurements written down? One record for people and machines alike.

The JSON holds `device`, `versions` and `results`; a figure is the median over the runs,
which stand beside it.
`floor_ratio` compares a decode step with the time the device needs to read what the step reads; it is null
where no such ceiling was measured.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from slipstream import __version__
from slipstream.bench.measure import RunFigures
from slipstream.bench.workload import BenchRequest
from slipstream.core.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineFacts:
    """What ran: named once for all results of one engine."""

    model: str
    dtype: str
    quantization: str
    kernels: dict[str, str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """One workload on one engine; field for field what the JSON holds."""

    name: str
    model: str
    dtype: str
    quantization: str
    num_requests: int
    isl: float
    osl: float
    ttft_ms: float
    tpot_ms: float | None
    output_tokens_per_s: float
    total_tokens_per_s: float
    floor_ratio: float | None
    peak_memory_bytes: int
    executed_tokens: int
    kernels: dict[str, str]
    runs: list[dict[str, Any]]


def engine_facts(startup: Any, model: str) -> EngineFacts:
    """Name the parts in use. `startup` is what `LLM.startup` returns, `model` what it was given."""
    runner = startup.engine.runner
    methods = {
        type(module.quant).__name__
        for module in runner.model.modules()
        if getattr(module, "quant", None) is not None
    }
    linear = ", ".join(sorted(methods)) or "none"
    return EngineFacts(
        # A path says nothing elsewhere; a hub id does.
        model=Path(model).name if Path(model).exists() else model,
        dtype=startup.resolved.dtype,
        quantization="none" if linear == "Unquantized" else linear,
        kernels={"attention": type(runner.backend).__name__, "linear": linear, **outside_kernels(startup)},
    )


def outside_kernels(startup: Any) -> dict[str, str]:
    """Return the kernels from outside that compute ops of this engine, by op."""
    from slipstream.kernels.plugins import KERNELS, KernelFacts, choose_kernel

    facts = KernelFacts(device=startup.resolved.device, dtype=startup.resolved.dtype)
    plugins = KERNELS.plugins()
    chosen = {plugin.op: choose_kernel(plugin.op, facts, plugins)[0] for plugin in plugins}
    return {op: plugin.name for op, plugin in chosen.items() if plugin is not None}


def summarize(
    name: str,
    facts: EngineFacts,
    requests: Sequence[BenchRequest],
    runs: Sequence[RunFigures],
    *,
    peak_memory_bytes: int,
) -> Result:
    """Return the medians over the runs."""

    def median(figure: str) -> float:
        return statistics.median(getattr(run, figure) for run in runs)

    return Result(
        name=name,
        model=facts.model,
        dtype=facts.dtype,
        quantization=facts.quantization,
        num_requests=len(requests),
        isl=_mean([len(request.prompt_token_ids) for request in requests]),
        osl=_mean([request.output_tokens for request in requests]),
        ttft_ms=median("ttft_ms"),
        tpot_ms=None if runs[0].tpot_ms is None else median("tpot_ms"),
        output_tokens_per_s=median("output_tokens_per_s"),
        total_tokens_per_s=median("total_tokens_per_s"),
        floor_ratio=None,
        peak_memory_bytes=peak_memory_bytes,
        executed_tokens=statistics.median_low([run.executed_tokens for run in runs]),
        kernels=facts.kernels,
        runs=[dataclasses.asdict(run) for run in runs],
    )


def _mean(lengths: Sequence[int]) -> float:
    """Return the mean length, as a whole number where it is one."""
    mean = round(statistics.fmean(lengths), 1)
    return int(mean) if mean == int(mean) else mean


def device_facts(device: str) -> dict[str, Any]:
    """Name the device, so that figures are compared only where it is the same."""
    import psutil
    import torch

    if device.partition(":")[0] == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return {"type": "cuda", "name": properties.name, "memory_bytes": properties.total_memory}
    return {
        "type": "cpu",
        "name": processor_name(),
        "num_cores": os.cpu_count(),
        "num_threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
    }


def processor_name() -> str:
    """Return the processor's trade name, or at least its architecture."""
    cpu_info = Path("/proc/cpuinfo")
    if cpu_info.is_file():
        for line in cpu_info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def version_facts() -> dict[str, str | None]:
    import torch

    return {
        "slipstream": __version__,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }


def write_json(path: Path, results: Sequence[Result], *, device: str) -> None:
    """Write the record of one command."""
    record = {
        "device": device_facts(device),
        "versions": version_facts(),
        "results": [dataclasses.asdict(result) for result in results],
    }
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def require_writable(path: Path) -> None:
    """Raise ConfigError before a measurement whose record could not be written after it."""
    try:
        with path.open("a", encoding="utf-8"):
            pass
    except OSError as error:
        raise ConfigError(
            f"The record cannot be written to {path}: {error.strerror}; name another file."
        ) from None


def show_table(results: Sequence[Result]) -> None:
    """Print the results to standard output; a pipe gets the whole width it needs."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{results[0].model}, {results[0].dtype}, {_kernel_line(results[0])}")
    columns = (
        "",
        "requests",
        "in",
        "out",
        "TTFT ms",
        "p99",
        "TPOT ms",
        "p99",
        "out tok/s",
        "all tok/s",
        "MiB",
    )
    for column in columns:
        table.add_column(column, justify="right" if column else "left")
    for result in results:
        table.add_row(*_cells(result))
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    console.print(table)
    console.print(
        f"median of {len(results[0].runs)} runs; executed tokens a run: "
        + ", ".join(f"{result.executed_tokens:,}" for result in results),
        highlight=False,
    )


def _kernel_line(result: Result) -> str:
    return ", ".join(f"{role} {name}" for role, name in result.kernels.items())


def _cells(result: Result) -> list[str]:
    p99 = {
        name: [run[name] for run in result.runs if run[name] is not None]
        for name in ("ttft_p99_ms", "tpot_p99_ms")
    }

    def shown(value: float | None) -> str:
        return "-" if value is None else f"{value:,.1f}"

    def worst(name: str) -> str:
        return shown(statistics.median(p99[name]) if p99[name] else None)

    return [
        result.name,
        str(result.num_requests),
        f"{result.isl:g}",
        f"{result.osl:g}",
        shown(result.ttft_ms),
        worst("ttft_p99_ms"),
        shown(result.tpot_ms),
        worst("tpot_p99_ms"),
        shown(result.output_tokens_per_s),
        shown(result.total_tokens_per_s),
        f"{result.peak_memory_bytes / 1024**2:,.0f}",
    ]
