"""How is a profile shown? The parts of the loop, then the kernels and ops that took longest."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from slipstream.bench.profile import KernelRow, Profile

MAX_ROWS = 20
MAX_NAME = 44


def table_path(trace: Path) -> Path:
    """Return where the table of a trace is kept: beside it."""
    return trace.with_suffix(".table.json")


def describe_profile(profile: Profile, trace: Path) -> Iterator[str]:
    """Yield lines for people. Shares are of the steps' wall time, in which the profiler's own cost is."""
    steps_s = profile.wall_s / max(1, profile.num_steps)
    rate = profile.step_bytes / steps_s
    ceiling = profile.ceiling_bytes_per_s
    yield (
        f"{profile.num_steps} steps of {steps_s * 1e3:.2f} ms on the {profile.device} under the profiler; a "
        f"step reads {profile.step_bytes / 1e6:,.1f} MB of weights, keys and values: {rate / 1e9:.1f} GB/s, "
        f"{rate / ceiling:.0%} of the {ceiling / 1e9:.1f} GB/s of a copy"
    )
    # Layers are inside of launch.
    yield "  ".join(f"{name} {seconds / profile.wall_s:.1%}" for name, seconds in profile.ranges.items())
    for kind in ("kernel", "op"):
        rows = [row for row in profile.rows if row.kind == kind]
        if rows:
            yield from _table(kind, rows)
    yield f"trace for ui.perfetto.dev: {trace}; all rows: {table_path(trace)}"


def _table(kind: str, rows: list[KernelRow]) -> Iterator[str]:
    yield (
        f"{kind:<{MAX_NAME}}{'calls':>8}{'ms':>10}{'us a call':>11}{'of the step':>13}{'MB a call':>11}"
        f"{'of a copy':>11}  shapes"
    )
    for row in rows[:MAX_ROWS]:
        moved = "-" if row.num_bytes is None else f"{row.num_bytes / 1e6:.3f}"
        share = "-" if row.ceiling_share is None else f"{row.ceiling_share:.0%}"
        name = row.name if len(row.name) < MAX_NAME else row.name[: MAX_NAME - 4] + "..."
        yield (
            f"{name:<{MAX_NAME}}{row.calls:>8}{row.time_us / 1e3:>10.2f}{row.time_us / row.calls:>11.1f}"
            f"{row.share:>13.1%}{moved:>11}{share:>11}  {row.shapes}"
        )
    rest = rows[MAX_ROWS:]
    if rest:
        yield f"{len(rest)} more: {sum(row.share for row in rest):.1%} of the step"
