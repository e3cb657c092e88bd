"""Does the record hold exactly the documented fields, and do its figures follow from the runs?"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from slipstream.bench.measure import RunFigures
from slipstream.bench.report import (
    EngineFacts,
    Result,
    engine_facts,
    require_writable,
    show_table,
    summarize,
    write_json,
)
from slipstream.bench.workload import BenchRequest
from slipstream.core.errors import ConfigError
from slipstream.kernels import KernelCapability, register_kernel, unregister_kernel
from slipstream.kernels.rms_norm import rms_norm
from slipstream.kernels.silu_and_mul import silu_and_mul
from slipstream.llm import LLM

FACTS = EngineFacts(
    model="tiny", dtype="float32", quantization="none", kernels={"attention": "A", "linear": "Unquantized"}
)
RESULT_KEYS = [
    "name",
    "model",
    "dtype",
    "quantization",
    "num_requests",
    "isl",
    "osl",
    "ttft_ms",
    "tpot_ms",
    "output_tokens_per_s",
    "total_tokens_per_s",
    "floor_ratio",
    "peak_memory_bytes",
    "executed_tokens",
    "kernels",
    "runs",
]


def figures(scale: float, *, tpot_ms: float | None = 2.0) -> RunFigures:
    return RunFigures(
        wall_s=scale,
        ttft_ms=10 * scale,
        ttft_p99_ms=20 * scale,
        tpot_ms=tpot_ms,
        tpot_p99_ms=tpot_ms,
        output_tokens_per_s=100 * scale,
        total_tokens_per_s=200 * scale,
        executed_tokens=9,
        num_cached_tokens=0,
        num_preemptions=0,
    )


def summary(**changes: float | None) -> Result:
    requests = [BenchRequest([1, 2, 3], 4), BenchRequest([1, 2, 3, 4], 4)]
    runs = [figures(scale, **changes) for scale in (3.0, 1.0, 2.0)]  # type: ignore[arg-type]
    return summarize("throughput", FACTS, requests, runs, peak_memory_bytes=7 << 20)


def test_figures_are_medians_and_lengths_means() -> None:
    result = summary()
    assert (result.ttft_ms, result.tpot_ms) == (20.0, 2.0)
    assert (result.output_tokens_per_s, result.total_tokens_per_s) == (200.0, 400.0)
    assert (result.num_requests, result.isl, result.osl) == (2, 3.5, 4)
    assert result.floor_ratio is None and result.executed_tokens == 9
    assert [run["wall_s"] for run in result.runs] == [3.0, 1.0, 2.0]


def test_record_holds_the_documented_fields(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    write_json(path, [summary()], device="cpu")
    record = json.loads(path.read_text(encoding="utf-8"))
    assert list(record) == ["device", "versions", "results"]
    assert record["device"]["type"] == "cpu" and record["device"]["name"]
    assert record["versions"]["slipstream"] and record["versions"]["torch"]
    assert list(record["results"][0]) == RESULT_KEYS
    assert set(record["results"][0]["runs"][0]) == {field.name for field in dataclasses.fields(RunFigures)}


def test_outputs_of_one_token_have_no_time_per_token(capsys: pytest.CaptureFixture[str]) -> None:
    result = summary(tpot_ms=None)
    assert result.tpot_ms is None
    show_table([result])
    assert " - " in capsys.readouterr().out


def test_table_shows_every_result_whole(capsys: pytest.CaptureFixture[str]) -> None:
    show_table([summary(), dataclasses.replace(summary(), name="latency-b16", isl=1234)])
    shown = capsys.readouterr().out
    for text in ("throughput", "latency-b16", "1234", "200.0", "median of 3 runs", "TTFT ms"):
        assert text in shown
    assert "…" not in shown


def test_the_parts_in_use_are_named(tiny_llm: LLM) -> None:
    facts = engine_facts(tiny_llm.startup, "org/no-such-folder")
    assert facts.model == "org/no-such-folder"
    assert facts.kernels["attention"] == type(tiny_llm.startup.engine.runner.backend).__name__
    assert facts.kernels["linear"] == "Unquantized" and facts.quantization == "none"
    assert facts.dtype == "float32"


def test_kernels_from_outside_are_named_too(tiny_llm: LLM) -> None:
    capability = KernelCapability(devices=frozenset({"cpu"}))
    register_kernel(silu_and_mul, op="silu_and_mul", name="mine", capability=capability)
    register_kernel(rms_norm, op="rms_norm", name="checked", capability=capability, priority=0)
    try:
        kernels = engine_facts(tiny_llm.startup, "m").kernels
    finally:
        unregister_kernel("mine")
        unregister_kernel("checked")
    assert kernels["silu_and_mul"] == "mine" and "rms_norm" not in kernels


def test_a_path_is_reduced_to_its_name(tiny_llm: LLM, tmp_path: Path) -> None:
    assert engine_facts(tiny_llm.startup, str(tmp_path)).model == tmp_path.name


def test_a_record_that_cannot_be_written_is_refused_first(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be written"):
        require_writable(tmp_path / "missing" / "record.json")
    require_writable(tmp_path / "record.json")
