"""What do the records of a run say? Rates, percentiles and goodput of one load point.

Invariant: every request is in the figures. Failed ones count in `num_requests`, under their kind, and against
goodput; times are of those that completed, and say of how many. Tokens are those the server counted; a server
that counts none has no token rates, instead of guessed ones.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from slipstream.bench.measure import percentile
from slipstream.bench.serving_load import Sent
from slipstream.bench.serving_record import RequestRecord
from slipstream.core.errors import ConfigError, nearest

# Beyond these, what was measured is partly the client.
MAX_LAG_MS, MAX_CLIENT_CPU_SHARE = 10.0, 0.9
SLO_METRICS = ("ttft", "tpot", "e2e")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distribution:
    """Milliseconds. Percentiles are nearest-rank: values that were measured."""

    count: int
    mean: float
    median: float
    p90: float
    p95: float
    p99: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Distribution | None:
        """Return the distribution of some times, None where there is none."""
        if not seconds:
            return None
        ms = sorted(value * 1000 for value in seconds)
        return cls(
            count=len(ms),
            mean=statistics.fmean(ms),
            median=statistics.median(ms),
            p90=percentile(ms, 90),
            p95=percentile(ms, 95),
            p99=percentile(ms, 99),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figures:
    """One load point; field for field what the JSON holds."""

    label: str
    num_requests: int
    num_completed: int
    errors: dict[str, int]
    error_examples: dict[str, str]
    wall_s: float
    requests_per_s: float
    output_tokens_per_s: float | None
    total_tokens_per_s: float | None
    prompt_tokens: int | None
    output_tokens: int | None
    cached_tokens: int | None
    num_short_outputs: int
    tokens_per_piece: float | None
    disagreements: dict[str, int]
    ttft_ms: Distribution | None
    tpot_ms: Distribution | None
    itl_ms: Distribution | None
    e2e_ms: Distribution | None
    slo_s: dict[str, float]
    num_within_slo: int | None
    goodput_per_s: float | None
    client_lag_p99_ms: float
    client_late_p99_ms: float
    client_cpu_share: float

    @property
    def is_client_bound(self) -> bool:
        lag = max(self.client_lag_p99_ms, self.client_late_p99_ms)
        return lag > MAX_LAG_MS or self.client_cpu_share > MAX_CLIENT_CPU_SHARE


def figures_of(label: str, sent: Sent, *, slo_s: Mapping[str, float]) -> Figures:
    """Return the figures of one load point."""
    records = sent.records
    done = [record for record in records if record.is_complete]
    prompt, output = sum_of(done, "prompt_tokens"), sum_of(done, "output_tokens")
    num_within = sum(meets(record, slo_s) for record in done) if slo_s else None
    pieces = sum(len(record.piece_s) for record in done)
    return Figures(
        label=label,
        num_requests=len(records),
        num_completed=len(done),
        errors=dict(Counter(str(r.error_kind) for r in records if not r.is_complete)),
        error_examples={str(r.error_kind): r.error for r in reversed(records) if not r.is_complete},
        wall_s=sent.wall_s,
        requests_per_s=len(done) / sent.wall_s,
        output_tokens_per_s=None if output is None else output / sent.wall_s,
        total_tokens_per_s=None if output is None or prompt is None else (prompt + output) / sent.wall_s,
        prompt_tokens=prompt,
        output_tokens=output,
        cached_tokens=sum_of(done, "cached_tokens"),
        num_short_outputs=sum(1 for r in done if (r.output_tokens or 0) < r.asked_tokens),
        tokens_per_piece=output / pieces if output is not None and pieces else None,
        disagreements=dict(Counter(r.disagreement for r in done if r.disagreement is not None)),
        ttft_ms=Distribution.of([r.ttft_s for r in done if r.ttft_s is not None]),
        tpot_ms=Distribution.of([r.tpot_s for r in done if r.tpot_s is not None]),
        itl_ms=Distribution.of([gap for r in done for gap in r.gaps_s()]),
        e2e_ms=Distribution.of([r.e2e_s for r in done]),
        slo_s=dict(slo_s),
        num_within_slo=num_within,
        goodput_per_s=None if num_within is None else num_within / sent.wall_s,
        client_lag_p99_ms=percentile(sent.lags_s, 99) * 1000 if sent.lags_s else 0.0,
        client_late_p99_ms=percentile([r.late_s for r in records], 99) * 1000 if records else 0.0,
        client_cpu_share=sent.client_cpu_share,
    )


def sum_of(records: Sequence[RequestRecord], name: str) -> int | None:
    """Add up a count of the server's; None unless every record has it."""
    counts = [getattr(record, name) for record in records]
    return sum(counts) if counts and None not in counts else None


def meets(record: RequestRecord, slo_s: Mapping[str, float]) -> bool:
    """Say whether each time of a completed request is within its objective.

    An answer of one token has no time per token, and meets any objective on it; one without a first token
    meets none on that.
    """
    for metric, bound in slo_s.items():
        value = getattr(record, f"{metric}_s")
        if value is None and metric == "tpot":
            continue
        if value is None or value > bound:
            return False
    return True


def parse_slo(text: str) -> dict[str, float]:
    """Read objectives such as `ttft=500ms,tpot=0.05,e2e=10s` into seconds. Raises ConfigError."""
    objectives: dict[str, float] = {}
    for part in text.split(","):
        name, _, value = part.strip().partition("=")
        if name not in SLO_METRICS:
            raise ConfigError(
                f"--slo has no objective {name!r}; give some of {', '.join(SLO_METRICS)}, e.g. "
                f"ttft=500ms,tpot=50ms.{nearest(name, SLO_METRICS)}"
            )
        if name in objectives:
            raise ConfigError(f"--slo gives {name} twice; give it once.")
        objectives[name] = parse_seconds(value)
    return objectives


def parse_seconds(text: str) -> float:
    value = text.strip()
    number, scale = (value[:-2], 1e-3) if value.endswith("ms") else (value.removesuffix("s"), 1.0)
    try:
        seconds = float(number) * scale
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < float("inf"):
        raise ConfigError(f"{text!r} is no time; write e.g. 500ms or 0.5s.")
    return seconds


def as_record(figures: Figures) -> dict[str, Any]:
    return dataclasses.asdict(figures)
