"""How is a measured server written down? A table for people, JSON for machines.

The JSON holds `versions`, `target`, `workload` and `points`; times are milliseconds. A key is never in it.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from slipstream import __version__
from slipstream.bench.serving_bench import ServingResult
from slipstream.bench.serving_figures import Distribution, Figures, as_record

METRICS = (("TTFT", "ttft_ms"), ("TPOT", "tpot_ms"), ("ITL", "itl_ms"), ("E2E", "e2e_ms"))
PIPE_WIDTH = 160


def serving_record(result: ServingResult) -> dict[str, Any]:
    target = result.target
    return {
        "versions": {
            "slipstream": __version__,
            "python": platform.python_version(),
            "platform": platform.platform(),
        },
        "target": {
            "url": target.url,
            "endpoint": target.endpoint,
            "model": target.model,
            "temperature": target.temperature,
            "ignore_eos": target.ignore_eos,
            "extra_body": dict(target.extra_body),
        },
        "workload": result.workload,
        "tokens_per_word": result.tokens_per_word,
        "points": [as_record(point) for point in result.points],
    }


def write_serving_json(path: Path, result: ServingResult) -> None:
    path.write_text(json.dumps(serving_record(result), indent=2) + "\n", encoding="utf-8")


def show_serving_table(result: ServingResult) -> None:
    """Print the load points to standard output, the times of a single one in full, and notes."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console = Console(width=PIPE_WIDTH)
    console.print(_points_table(result))
    if len(result.points) == 1:
        console.print(_times_table(result.points[0]))
    for point in result.points:
        for line in notes_on(point):
            console.print(f"{point.label}: {line}", highlight=False, markup=False)


def _points_table(result: ServingResult) -> Any:
    from rich.table import Table

    target = result.target
    table = Table(title=f"{target.model}, {target.endpoint}, {target.url}")
    has_slo = any(point.goodput_per_s is not None for point in result.points)
    columns = ["load", "ok", "failed", "in tok", "out tok", "req/s", "out tok/s", "all tok/s"]
    columns += ["TTFT ms", "p99", "TPOT ms", "p99", "E2E ms", "p99", *(["good/s"] if has_slo else [])]
    for place, column in enumerate(columns):
        table.add_column(column, justify="right" if place else "left")
    for point in result.points:
        cells = [
            point.label,
            str(point.num_completed),
            str(point.num_requests - point.num_completed),
            _count(point.prompt_tokens),
            _count(point.output_tokens),
            _number(point.requests_per_s, 2),
            _number(point.output_tokens_per_s),
            _number(point.total_tokens_per_s),
        ]
        for times in (point.ttft_ms, point.tpot_ms, point.e2e_ms):
            cells += [_time(times, "median"), _time(times, "p99")]
        table.add_row(*cells, *([_number(point.goodput_per_s, 2)] if has_slo else []))
    return table


def _times_table(point: Figures) -> Any:
    from rich.table import Table

    table = Table(title=f"{point.label}: milliseconds")
    names = ("mean", "median", "p90", "p95", "p99")
    for column in ("", *names, "of"):
        table.add_column(column, justify="right" if column else "left")
    for label, field in METRICS:
        times = getattr(point, field)
        count = "0" if times is None else f"{times.count:,}"
        table.add_row(label, *(_time(times, name) for name in names), count)
    return table


def notes_on(point: Figures) -> list[str]:
    """Return a line for each thing that a reader of the figures must know."""
    lines = [f"{n} failed: {kind} ({point.error_examples[kind]})" for kind, n in point.errors.items()]
    lines += [
        f"{count} answers disagree with their usage: {what}" for what, count in point.disagreements.items()
    ]
    if point.num_short_outputs:
        lines.append(
            f"{point.num_short_outputs} answers ended before the tokens asked for (see --ignore-eos)"
        )
    if point.cached_tokens and point.prompt_tokens:
        share = point.cached_tokens / point.prompt_tokens
        lines.append(f"{share:.0%} of the prompt tokens came from the server's prefix cache")
    if point.num_within_slo is not None:
        lines.append(f"{point.num_within_slo} of {point.num_requests} requests met the objectives")
    if point.is_client_bound:
        lines.append(
            f"the client was a bottleneck (its loop was {point.client_lag_p99_ms:.0f} ms late at p99, "
            f"requests {point.client_late_p99_ms:.0f} ms, it used {point.client_cpu_share:.0%} of a core): "
            "times include that; run it on another machine, or lower the load"
        )
    return lines


def _count(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def _number(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _time(times: Distribution | None, name: str) -> str:
    return "-" if times is None else _number(getattr(times, name))


def curves_of(points: Sequence[Figures], field: str, percentile: str) -> list[tuple[float, float, str]]:
    """Return (throughput, latency, label) of each point that has both, in the order of their loads."""
    found: list[tuple[float, float, str]] = []
    for point in points:
        times = getattr(point, field)
        if times is not None and point.output_tokens_per_s is not None:
            found.append((point.output_tokens_per_s, getattr(times, percentile), point.label))
    return found
