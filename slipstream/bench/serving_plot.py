"""What does throughput cost in latency? One panel a time (TTFT, TPOT, E2E), as an image or a page.

The page is one file without script or outside request: SVG, and the table of figures below it.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from slipstream.bench.serving_bench import ServingResult
from slipstream.bench.serving_figures import Figures
from slipstream.bench.serving_report import curves_of, notes_on
from slipstream.core.errors import MissingExtraError

PANELS = (
    ("ttft_ms", "Time to first token"),
    ("tpot_ms", "Time per output token"),
    ("e2e_ms", "End to end"),
)
PERCENTILES = ("median", "p99")
WIDTH, HEIGHT = 430, 320
LEFT, RIGHT, TOP, BOTTOM = 62, 18, 40, 46

Curve = list[tuple[float, float, str]]
Place = Callable[[float, float], tuple[float, float]]


def write_png(path: Path, result: ServingResult) -> None:
    """Draw the plot into a PNG file. Raises MissingExtraError without matplotlib."""
    # Not pyplot, which would choose a backend and keep every figure.
    figure = import_matplotlib()(figsize=(13.5, 4.4), layout="constrained")
    figure.suptitle(title_of(result), fontsize=11)
    for axes, (field, name) in zip(figure.subplots(1, len(PANELS)), PANELS, strict=True):
        for percentile in PERCENTILES:
            curve = curves_of(result.points, field, percentile)
            axes.plot([x for x, _, _ in curve], [y for _, y, _ in curve], marker="o", label=percentile)
            if percentile == PERCENTILES[0]:
                for x, y, label in curve:
                    axes.annotate(label, (x, y), textcoords="offset points", xytext=(4, -12), fontsize=7)
        axes.set(title=name, xlabel="output tokens/s", ylabel="ms")
        # Room for the labels at the right end and above the highest point.
        axes.margins(0.12)
        axes.set(xlim=(0, None), ylim=(0, None))
        axes.grid(alpha=0.25)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=140, format="png")


def import_matplotlib() -> Any:
    """Return matplotlib's Figure. Raises MissingExtraError without it."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtraError(
            "The plot needs matplotlib, which is not installed; run `pip install 'slipstream-llm[bench]'`, "
            "or leave --png out."
        ) from None
    return Figure


def write_html(path: Path, result: ServingResult) -> None:
    """Write the plot and its table as one page that needs nothing else."""
    panels = "\n".join(_panel(result.points, field, name) for field, name in PANELS)
    notes = "".join(f"<li>{_text(f'{p.label}: {line}')}</li>" for p in result.points for line in notes_on(p))
    facts = ", ".join(f"{key.replace('_', ' ')}: {value}" for key, value in result.workload.items())
    page = PAGE.format(
        title=_text(title_of(result)),
        facts=_text(facts),
        panels=panels,
        rows=_rows(result.points),
        notes=notes,
    )
    path.write_text(page, encoding="utf-8")


def title_of(result: ServingResult) -> str:
    return f"{result.target.model}: throughput against latency ({result.target.endpoint})"


def _panel(points: Sequence[Figures], field: str, name: str) -> str:
    curves = {percentile: curves_of(points, field, percentile) for percentile in PERCENTILES}
    everything = [place for curve in curves.values() for place in curve]
    if not everything:
        return f"<figure><figcaption>{_text(name)}</figcaption><p>Nothing was measured.</p></figure>"
    x_max, y_max = max(x for x, _, _ in everything), max(y for _, y, _ in everything)
    x_step, y_step = nice_step(x_max), nice_step(y_max)
    x_end, y_end = x_step * math.ceil(x_max / x_step), y_step * math.ceil(y_max / y_step)

    def at(x: float, y: float) -> tuple[float, float]:
        across, up = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
        return LEFT + across * x / x_end, HEIGHT - BOTTOM - up * y / y_end

    parts = [_grid(at, x_step, x_end, y_step, y_end)]
    parts += [_curve(at, curve, percentile) for percentile, curve in curves.items()]
    legend = "".join(
        f'<g class="{name_}"><circle cx="{WIDTH - 118 + 62 * place}" cy="20" r="4"/>'
        f'<text x="{WIDTH - 109 + 62 * place}" y="24">{name_}</text></g>'
        for place, name_ in enumerate(PERCENTILES)
    )
    return (
        f'<figure><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{_text(name)}">'
        f'<text class="name" x="{LEFT - 46}" y="24">{_text(name)}, ms</text>{legend}{"".join(parts)}'
        f'<text class="axis" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 8}">output tokens/s</text>'
        "</svg></figure>"
    )


def _grid(at: Place, x_step: float, x_end: float, y_step: float, y_end: float) -> str:
    parts: list[str] = []
    for number in range(round(x_end / x_step) + 1):
        (x, bottom), (_, top) = at(number * x_step, 0), at(number * x_step, y_end)
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{bottom:.1f}" y2="{top:.1f}"/>')
        parts.append(f'<text class="tick x" x="{x:.1f}" y="{bottom + 16:.1f}">{number * x_step:,g}</text>')
    for number in range(round(y_end / y_step) + 1):
        (left, y), (right, _) = at(0, number * y_step), at(x_end, number * y_step)
        parts.append(f'<line x1="{left:.1f}" x2="{right:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick y" x="{left - 8:.1f}" y="{y + 4:.1f}">{number * y_step:,g}</text>')
    return f'<g class="grid">{"".join(parts)}</g>'


def _curve(at: Place, curve: Curve, percentile: str) -> str:
    places = [(*at(x, y), x, y, label) for x, y, label in curve]
    line = " ".join(f"{px:.1f},{py:.1f}" for px, py, *_ in places)
    dots = "".join(
        f'<circle cx="{px:.1f}" cy="{py:.1f}" r="4"><title>{_text(label)}: {x:,.1f} tokens/s, {percentile} '
        f"{y:,.1f} ms</title></circle>"
        for px, py, x, y, label in places
    )
    labels = ""
    if percentile == PERCENTILES[0]:
        labels = "".join(
            f'<text x="{px:.1f}" y="{py + 17:.1f}">{_text(label)}</text>' for px, py, _, _, label in places
        )
    return f'<g class="{percentile}"><polyline points="{line}"/>{dots}{labels}</g>'


def nice_step(end: float) -> float:
    """Return a step of 1, 2 or 5 times a power of ten that divides a scale to `end` into 3 to 7 parts."""
    if end <= 0:
        return 1.0
    raw = end / 5
    power = 10.0 ** math.floor(math.log10(raw))
    return power * min((1, 2, 5, 10), key=lambda factor: abs(math.log(raw / (factor * power))))


def _rows(points: Sequence[Figures]) -> str:
    rows: list[str] = []
    for point in points:
        cells = [point.label, f"{point.num_completed:,}", f"{point.num_requests - point.num_completed:,}"]
        rates = (point.requests_per_s, point.output_tokens_per_s, point.goodput_per_s)
        cells += ["-" if rate is None else f"{rate:,.2f}" for rate in rates]
        for field, _ in PANELS:
            times = getattr(point, field)
            cells += ["-" if times is None else f"{getattr(times, name):,.1f}" for name in PERCENTILES]
        rows.append("<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in cells) + "</tr>")
    return "\n".join(rows)


def _text(text: str) -> str:
    return html.escape(text)


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --ink: #1c2430; --soft: #667085; --line: #d9dee7; --back: #fff;
  --median: #2563eb; --p99: #d97706; }}
@media (prefers-color-scheme: dark) {{ :root {{ --ink: #e6eaf1; --soft: #98a2b3; --line: #2c3442;
  --back: #12161d; --median: #6ea8fe; --p99: #fbbf24; }} }}
body {{ margin: 2rem auto; max-width: 1380px; padding: 0 1rem; background: var(--back); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }}
h1 {{ font-size: 1.25rem; }} p, li {{ color: var(--soft); }}
.panels {{ display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(320px, 1fr)); }}
figure {{ margin: 0; border: 1px solid var(--line); border-radius: 10px; padding: .5rem; }}
svg {{ display: block; width: 100%; font-size: 11px; fill: var(--ink); }}
svg .name {{ font-size: 13px; font-weight: 600; }} svg .axis {{ text-anchor: middle; fill: var(--soft); }}
.grid line {{ stroke: var(--line); }} .tick {{ fill: var(--soft); }} .tick.x {{ text-anchor: middle; }}
.tick.y {{ text-anchor: end; }} polyline {{ fill: none; stroke-width: 2; }}
.median polyline {{ stroke: var(--median); }} .median circle {{ fill: var(--median); }}
.p99 polyline {{ stroke: var(--p99); }} .p99 circle {{ fill: var(--p99); }}
.median text {{ text-anchor: start; fill: var(--soft); }} .p99 text {{ fill: var(--soft); }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; margin-top: 1.5rem; width: 100%; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .35rem .6rem; text-align: right; border-bottom: 1px solid var(--line); }}
th:first-child, td:first-child {{ text-align: left; }} th {{ color: var(--soft); font-weight: 500; }}
</style></head><body>
<h1>{title}</h1><p>{facts}</p>
<div class="panels">{panels}</div>
<div class="scroll"><table><thead><tr><th>load</th><th>ok</th><th>failed</th><th>req/s</th>
<th>out tok/s</th><th>good/s</th><th>TTFT ms</th><th>p99</th><th>TPOT ms</th><th>p99</th><th>E2E ms</th>
<th>p99</th></tr></thead>
<tbody>{rows}</tbody></table></div>
<ul>{notes}</ul>
</body></html>
"""
