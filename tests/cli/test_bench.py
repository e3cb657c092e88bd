"""Does `slipstream bench` measure what was asked, write the record, and fail where the work was not done?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from slipstream.cli.bench import BenchJob, WorkloadOptions, length_range, throughput
from slipstream.cli.options import EngineOptions
from slipstream.llm import LLM
from tests.cli.conftest import Slipstream

SMALL = ("--isl", 6, "--osl", 4, "--num-requests", 3, "--runs", 2)


def record_of(slipstream: Slipstream, path: Path, *arguments: Any) -> dict[str, Any]:
    finished = slipstream("bench", *arguments, "--json", path)
    assert finished.code == 0, finished.err
    return json.loads(path.read_text(encoding="utf-8"))


def test_throughput(slipstream: Slipstream, tiny_path: str, tmp_path: Path) -> None:
    record = record_of(slipstream, tmp_path / "r.json", "throughput", tiny_path, *SMALL)
    (result,) = record["results"]
    assert (result["name"], result["model"]) == ("throughput", Path(tiny_path).name)
    assert (result["num_requests"], result["isl"], result["osl"]) == (3, 6, 4)
    # 3 requests of 6 prompt tokens and 4 outputs, of which the last never runs.
    assert result["executed_tokens"] == 3 * (6 + 4 - 1)
    assert [run["executed_tokens"] for run in result["runs"]] == [27, 27]
    assert result["floor_ratio"] is None and result["peak_memory_bytes"] > 0


def test_the_table_goes_to_standard_output(slipstream: Slipstream, tiny_path: str) -> None:
    finished = slipstream("bench", "throughput", tiny_path, *SMALL, "--concurrency", 2)
    assert "throughput-c2" in finished.out and "executed tokens a run: 27" in finished.out
    assert "run 2 of 2" in finished.err and "ready in" in finished.err
    assert "ready in" not in finished.out


def test_latency_of_several_batch_sizes(slipstream: Slipstream, tiny_path: str, tmp_path: Path) -> None:
    arguments = ("latency", tiny_path, *SMALL, "--batch-sizes", "1,2")
    record = record_of(slipstream, tmp_path / "r.json", *arguments)
    assert [result["name"] for result in record["results"]] == ["latency-b1", "latency-b2"]
    for result in record["results"]:
        assert result["executed_tokens"] == 27
        assert result["tpot_ms"] > 0 and result["ttft_ms"] > 0


def test_dataset(slipstream: Slipstream, tiny_path: str, tmp_path: Path) -> None:
    dataset = tmp_path / "d.jsonl"
    lines = [{"prompt": "hello", "output_tokens": 3}, {"prompt_token_ids": [1, 2], "max_tokens": 5}]
    dataset.write_text("\n".join(json.dumps(line) for line in lines), encoding="utf-8")
    arguments = ("throughput", tiny_path, "--dataset", dataset, "--runs", 1)
    (result,) = record_of(slipstream, tmp_path / "r.json", *arguments)["results"]
    assert (result["num_requests"], result["isl"], result["osl"]) == (2, 3.5, 4)
    assert result["executed_tokens"] == (5 + 3 - 1) + (2 + 5 - 1)
    limited = record_of(slipstream, tmp_path / "r.json", *arguments, "--num-requests", 1)
    assert limited["results"][0]["num_requests"] == 1


def test_reuse_is_off_unless_asked_for(slipstream: Slipstream, tiny_path: str, tmp_path: Path) -> None:
    """Five equal prompts: without reuse each runs whole; with it one does, in every run anew."""
    dataset = tmp_path / "d.jsonl"
    line = json.dumps({"prompt_token_ids": [5] * 100, "max_tokens": 1})
    dataset.write_text("\n".join([line] * 5), encoding="utf-8")
    arguments = ("throughput", tiny_path, "--dataset", dataset, "--concurrency", 1, "--runs", 2)
    (off,) = record_of(slipstream, tmp_path / "r.json", *arguments)["results"]
    assert [run["executed_tokens"] for run in off["runs"]] == [500, 500]
    (on,) = record_of(slipstream, tmp_path / "r.json", *arguments, "--reuse")["results"]
    assert all(100 < run["executed_tokens"] < 200 for run in on["runs"])
    assert all(run["num_cached_tokens"] + run["executed_tokens"] == 500 for run in on["runs"])


def test_work_that_was_not_done_fails(
    slipstream: Slipstream, tiny_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine that reuses prefixes behind the bench's back is caught, and no record is left."""
    record = tmp_path / "r.json"
    monkeypatch.setattr("slipstream.bench.measure.params_of", shared_params)
    monkeypatch.setattr("slipstream.engine.assembly.KvCache", always_reusing)
    dataset = tmp_path / "d.jsonl"
    dataset.write_text(json.dumps({"prompt_token_ids": [5] * 100, "max_tokens": 2}), encoding="utf-8")
    failed = slipstream("bench", "throughput", tiny_path, "--dataset", dataset, "--runs", 1, "--json", record)
    assert failed.code == 1 and failed.out == ""
    assert "and 101 were asked for" in failed.err.splitlines()[-1]
    assert record.read_text(encoding="utf-8") == ""


def shared_params(request: Any, salt: str) -> Any:
    from slipstream.core.sampling_params import SamplingParams

    return SamplingParams(temperature=0.0, max_tokens=request.output_tokens, ignore_eos=True)


def always_reusing(*given: Any, **options: Any) -> Any:
    from slipstream.cache.kv_cache import KvCache

    return KvCache(*given, **{**options, "enable_block_reuse": True})


def test_preemption_fails_and_says_what_to_do(slipstream: Slipstream, tiny_path: str) -> None:
    failed = slipstream(
        "bench",
        "throughput",
        tiny_path,
        *("--isl", 30, "--osl", 40, "--num-requests", 4, "--runs", 1, "--kv-cache-max-tokens", 160),
    )
    assert failed.code == 1
    assert "preemptions" in failed.err and "--kv-cache-max-tokens" in failed.err


def test_the_pool_is_made_large_enough_on_a_cpu(slipstream: Slipstream, tiny_path: str) -> None:
    """24 requests of 600 tokens need more than the 8,192 of the default, and are not preempted."""
    arguments = ("--isl", 590, "--osl", 10, "--num-requests", 24, "--runs", 1)
    assert slipstream("bench", "throughput", tiny_path, *arguments).code == 0


def pool_of(engine: EngineOptions, **options: Any) -> int | None:
    workload = WorkloadOptions(**options)
    job = throughput(model="m", concurrency=None, **fields(workload), **fields(engine))
    assert isinstance(job, BenchJob)
    return job._cpu_pool_tokens(engine.to_llm_options())


def fields(record: Any) -> dict[str, Any]:
    return {name: getattr(record, name) for name in record.__dataclass_fields__}


def test_the_pool_is_left_alone_where_an_option_bounds_it() -> None:
    large: dict[str, Any] = {"isl": 1000, "osl": 1000, "num_requests": 64}
    assert (pool_of(EngineOptions(device="cpu"), **large) or 0) >= 64 * 2000
    assert (pool_of(EngineOptions(device="cpu", max_batch_size=8), **large) or 0) < 8 * 2100
    assert pool_of(EngineOptions(device="cpu"), isl=10, osl=10, num_requests=4) is None
    assert pool_of(EngineOptions(device="cpu", kv_cache_max_tokens=64), **large) is None
    assert pool_of(EngineOptions(device="cpu", kv_cache_max_bytes=64), **large) is None
    assert pool_of(EngineOptions(device="cuda"), **large) is None


def test_a_pool_beyond_memory_says_why_it_was_so_large(slipstream: Slipstream, tiny_path: str) -> None:
    refused = slipstream(
        "bench", "throughput", tiny_path, "--isl", "1m", "--osl", "1m", "--num-requests", 10**6, "--runs", 1
    )
    # What is compiled once may be said before.
    assert refused.code == 1 and "Error: KvCacheConfig(" in refused.err
    assert "all requests to run at once" in refused.err


def test_a_record_that_cannot_be_written_is_refused_before_loading(
    slipstream: Slipstream, tmp_path: Path
) -> None:
    refused = slipstream("bench", "throughput", "no-model", "--json", tmp_path / "no" / "r.json")
    assert refused.code == 1 and "cannot be written" in refused.err


@pytest.mark.parametrize(
    ("given", "expected"),
    [((None, None, None), (128, 128)), ((5, None, None), (5, 5)), ((None, 3, 9), (3, 9))],
)
def test_length_ranges(given: Any, expected: tuple[int, int]) -> None:
    assert length_range("isl", *given) == expected


def test_the_door_is_the_librarys(tiny_llm: LLM) -> None:
    """The protocol that measurements use names methods of `LLM` itself."""
    from slipstream.bench.measure import Door

    names = {name for name in vars(Door) if not name.startswith("_")}
    assert names == {"generate", "generate_async", "get_stats"}
    assert all(callable(getattr(tiny_llm, name)) for name in names)


def test_a_profile_is_written_beside_the_measurement(
    slipstream: Slipstream, tiny_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slipstream.bench.profile.CEILING_BYTES", {"cpu": 8 << 20})
    path = tmp_path / "trace.json"
    finished = slipstream("bench", "latency", tiny_path, *SMALL, "--batch-sizes", "1,2", "--profile", path)
    assert finished.code == 0, finished.err
    # Two requests at a time: a step of both prompts, then three of two tokens.
    assert "4 steps of " in finished.out and "trace for ui.perfetto.dev" in finished.out
    assert json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    table = json.loads((tmp_path / "trace.table.json").read_text(encoding="utf-8"))
    assert table["num_steps"] == 4 and table["rows"] and table["ranges"]["plan"] > 0


def test_a_profile_that_could_not_be_written_is_refused_before_the_run(
    slipstream: Slipstream, tiny_path: str, tmp_path: Path
) -> None:
    finished = slipstream("bench", "latency", tiny_path, *SMALL, "--profile", tmp_path / "no" / "trace.json")
    assert finished.code == 1 and "cannot be written" in finished.err and "ready in" not in finished.err
