"""Are figures what the records say, failures included? Records made by hand, results worked out by hand."""

from __future__ import annotations

from array import array
from typing import Any

import pytest

from slipstream.bench.serving_figures import Distribution, figures_of, meets, parse_slo
from slipstream.bench.serving_load import Sent
from slipstream.bench.serving_record import RequestRecord
from slipstream.bench.serving_report import notes_on
from slipstream.core.errors import ConfigError


def record_of(
    *, pieces: tuple[float, ...] = (0.1, 0.2, 0.3), end: float = 0.4, **fields: Any
) -> RequestRecord:
    """A request that was due at 10 s; times are after that."""
    record = RequestRecord(10.0, 3, sent_s=10.0, end_s=10.0 + end, finish_reason="length")
    record.piece_s = array("d", [10.0 + piece for piece in pieces])
    record.prompt_tokens, record.output_tokens, record.cached_tokens = 5, 3, 2
    for name, value in fields.items():
        setattr(record, name, value)
    return record


def sent_of(*records: RequestRecord, **fields: Any) -> Sent:
    facts = {"wall_s": 2.0, "lags_s": [0.001], "client_cpu_share": 0.1, **fields}
    return Sent(records=list(records), **facts)


def test_times_of_a_record() -> None:
    record = record_of(sent_s=10.05)
    assert record.ttft_s == pytest.approx(0.1) and record.late_s == pytest.approx(0.05)
    assert record.tpot_s == pytest.approx(0.1) and record.e2e_s == pytest.approx(0.4)
    assert record.gaps_s() == pytest.approx([0.1, 0.1])
    # Six tokens in three pieces: five steps between the first and the last.
    assert record_of(output_tokens=6).tpot_s == pytest.approx(0.2 / 5)
    assert record_of(pieces=(0.1,), output_tokens=3).tpot_s is None
    assert record_of(pieces=()).ttft_s is None


def test_rates() -> None:
    figures = figures_of("c=1", sent_of(record_of(), record_of()), slo_s={})
    assert (figures.num_requests, figures.num_completed) == (2, 2)
    assert (figures.requests_per_s, figures.output_tokens_per_s) == (1.0, 3.0)
    assert figures.total_tokens_per_s == 8.0 and figures.cached_tokens == 4
    assert figures.tokens_per_piece == 1.0 and figures.goodput_per_s is None
    assert not figures.is_client_bound and notes_on(figures) == [
        "40% of the prompt tokens came from the server's prefix cache"
    ]


def test_failures_stay_in_the_figures() -> None:
    lost, busy = record_of(), record_of(pieces=())
    lost.fail("cut_stream", "the stream ended before [DONE]")
    busy.fail("http_429", "busy")
    figures = figures_of("c=1", sent_of(record_of(), lost, busy, busy), slo_s={"ttft": 1.0})
    assert (figures.num_requests, figures.num_completed) == (4, 1)
    assert figures.errors == {"cut_stream": 1, "http_429": 2}
    assert figures.output_tokens_per_s == 1.5
    assert figures.ttft_ms is not None and figures.ttft_ms.count == 1
    assert (figures.num_within_slo, figures.goodput_per_s) == (1, 0.5)
    assert "2 failed: http_429 (busy)" in notes_on(figures)


def test_no_rate_is_guessed_without_usage() -> None:
    figures = figures_of("c=1", sent_of(record_of(), record_of(output_tokens=None)), slo_s={})
    assert figures.output_tokens is None and figures.output_tokens_per_s is None
    assert figures.disagreements == {"no usage": 1}


def test_short_answers_are_counted() -> None:
    figures = figures_of("c=1", sent_of(record_of(output_tokens=2, pieces=(0.1, 0.2))), slo_s={})
    assert figures.num_short_outputs == 1


@pytest.mark.parametrize(
    "fields", [{"lags_s": [0.001] * 9 + [0.02] * 9}, {"client_cpu_share": 0.95}], ids=["lag", "cpu"]
)
def test_a_slow_client_is_reported(fields: dict[str, Any]) -> None:
    figures = figures_of("c=1", sent_of(record_of(), **fields), slo_s={})
    assert figures.is_client_bound
    assert any("the client was a bottleneck" in line for line in notes_on(figures))


def test_a_late_client_is_reported() -> None:
    assert figures_of("r=1/s", sent_of(record_of(sent_s=10.5)), slo_s={}).is_client_bound


def test_distribution_is_of_values_that_were_measured() -> None:
    times = Distribution.of([value / 1000 for value in range(1, 101)])
    assert times is not None
    assert (times.count, times.p90, times.p95, times.p99) == (100, 90.0, 95.0, 99.0)
    assert times.mean == pytest.approx(50.5) and times.median == pytest.approx(50.5)
    assert Distribution.of([]) is None


@pytest.mark.parametrize(
    ("record", "is_good"),
    [
        (record_of(), True),
        (record_of(pieces=(0.11, 0.2, 0.3)), False),
        (record_of(pieces=(0.1, 0.2, 0.31)), False),
        (record_of(end=0.6), False),
        # One token has no time per token, and none has no first one.
        (record_of(pieces=(0.1,), output_tokens=1), True),
        (record_of(pieces=(), output_tokens=0), False),
    ],
)
def test_objectives(record: RequestRecord, is_good: bool) -> None:
    assert meets(record, {"ttft": 0.1001, "tpot": 0.1001, "e2e": 0.5}) is is_good


def test_parse_slo() -> None:
    assert parse_slo("ttft=500ms, tpot=0.05,e2e=10s") == {"ttft": 0.5, "tpot": 0.05, "e2e": 10.0}


@pytest.mark.parametrize(
    "given", ["ttf=1", "ttft", "ttft=0", "ttft=x", "ttft=1,ttft=2", "ttft=nan", "ttft=inf"]
)
def test_parse_slo_refuses(given: str) -> None:
    with pytest.raises(ConfigError):
        parse_slo(given)
