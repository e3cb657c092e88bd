"""Does a profile hold the steps' ops by name with the bytes they move, and leave the engine as it was?"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from slipstream.bench import profile as profile_file
from slipstream.bench.op_bytes import FORMULAS, StepBytes, bytes_of
from slipstream.bench.profile import Profile, profile_requests
from slipstream.bench.profile_ranges import COMPUTING, named_ranges
from slipstream.bench.profile_table import describe_profile, table_path
from slipstream.bench.workload import BenchRequest
from slipstream.engine.assembly import Assembly, assemble
from slipstream.engine.config import EngineConfig
from slipstream.kernels.cpu.library import library
from slipstream.kernels.cpu.signatures import SIGNATURES
from tests.bench.tiny_checkpoint import (
    HEAD_DIM,
    HIDDEN,
    INTER,
    KV_HEADS,
    NUM_LAYERS,
    VOCAB_SIZE,
    write_checkpoint,
)

REQUESTS = [BenchRequest([1, 2, 3, 4, 5], 4), BenchRequest([9, 8, 7], 4)]
# Both prompts in one step, then three steps of two tokens each.
NUM_STEPS = 4


@pytest.fixture(scope="module", autouse=True)
def small_ceiling() -> Any:
    patch = pytest.MonkeyPatch()
    patch.setattr(profile_file, "CEILING_BYTES", {"cpu": 8 << 20})
    yield
    patch.undo()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("tiny"))


def start(folder: Path, **options: Any) -> Assembly:
    return assemble(EngineConfig(model=str(folder), **options))


def run(folder: Path, trace: Path, **options: Any) -> tuple[Profile, set[str]]:
    """Return the profile and the names in its trace."""
    found = profile_requests(start(folder, **options), REQUESTS, trace=trace)
    events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    return found, {event.get("name", "") for event in events}


@pytest.fixture(scope="module")
def plain(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Profile, set[str]]:
    """A run op by op."""
    trace = tmp_path_factory.mktemp("plain") / "trace.json"
    return run(folder, trace, dtype="float32", attn_backend="torch")


def test_ops_have_their_time_and_bytes(plain: tuple[Profile, set[str]]) -> None:
    found, names = plain
    assert found.num_steps == NUM_STEPS and found.device == "cpu" and found.ceiling_bytes_per_s > 1e8
    assert {"plan", "launch", "layer 0", "layer 1", "sample", "collect", "commit"} <= names
    assert {"slipstream::paged_attention", "aten::mm"} <= names
    gate_up = [row for row in found.rows if row.name == "aten::mm" and f"{HIDDEN}x{2 * INTER}" in row.shapes]
    assert sum(row.calls for row in gate_up) == NUM_STEPS * NUM_LAYERS
    for row in gate_up:
        tokens = int(row.shapes.split("x")[0])
        assert row.num_bytes == 4 * (tokens * HIDDEN + HIDDEN * 2 * INTER + tokens * 2 * INTER)
        expected = row.num_bytes * row.calls / (row.time_us * 1e-6) / found.ceiling_bytes_per_s
        assert row.ceiling_share == pytest.approx(expected) and row.kind == "op"
        assert row.share == pytest.approx(row.time_us * 1e-6 / found.wall_s)
    # A tiny model's steps are mostly Python, which is no op's time.
    assert 0.0 < sum(row.share for row in found.rows) <= 1.0
    assert [row.time_us for row in found.rows] == sorted((row.time_us for row in found.rows), reverse=True)
    ranges = found.ranges
    assert ranges["layers"] < ranges["launch"] < found.wall_s
    assert ranges.keys() == {"plan", "launch", "layers", "sample", "collect", "commit"}


def test_keys_and_values_are_counted_by_the_steps(plain: tuple[Profile, set[str]]) -> None:
    found, _ = plain
    # Contexts at the end of each step: 5 and 3, then one more each time.
    contexts = sum(5 + i + 3 + i for i in range(NUM_STEPS))
    read = contexts * NUM_LAYERS * 2 * KV_HEADS * HEAD_DIM * 4
    rows = [row for row in found.rows if row.name == "slipstream::paged_attention"]
    assert sum(row.calls for row in rows) == NUM_STEPS * NUM_LAYERS
    assert all(row.num_bytes == read // row.calls for row in rows)
    layer = 4 * (HIDDEN * 2 + HIDDEN * HIDDEN * 2 + HIDDEN * 2 * KV_HEADS * HEAD_DIM + 3 * HIDDEN * INTER)
    weights = NUM_LAYERS * layer + 4 * VOCAB_SIZE * HIDDEN
    assert found.step_bytes == (NUM_STEPS * weights + read) // NUM_STEPS


def test_native_calls_appear_by_name(folder: Path, tmp_path: Path) -> None:
    found, names = run(folder, tmp_path / "trace.json", quantization="int8")
    assert {"native::decode", "native::decoder_blocks", "plan", "commit"} <= names
    rows = {row.name: row for row in found.rows if row.name.startswith("native::")}
    assert rows["native::decode"].calls == NUM_STEPS - 1 and rows["native::decoder_blocks"].calls == 1
    assert rows["native::decode"].num_bytes and rows["native::decode"].share > 0.0
    assert "native::decode" not in found.ranges


def test_an_engine_is_left_as_it_was(folder: Path) -> None:
    engine = start(folder, dtype="float32").engine
    runner: Any = engine.runner
    places = (engine.scheduler, runner, *runner.model.layers, library())
    before = [dict(vars(place)) for place in places]
    with named_ranges(engine, has_nvtx=False):
        assert [dict(vars(place)) for place in places] != before
    assert [dict(vars(place)).keys() for place in places] == [names.keys() for names in before]
    assert library().ss_decode is before[-1]["ss_decode"]


def test_what_computes_is_in_the_library() -> None:
    assert set(COMPUTING) <= SIGNATURES.keys()
    others = {name for name in SIGNATURES if name not in COMPUTING}
    assert all("bytes" in name or "threads" in name or name == "ss_pack" for name in others), others


@pytest.mark.parametrize(
    ("op", "shapes", "expected"),
    [
        ("aten::mm", [[3, 8], [8, 5]], 2 * (24 + 40 + 15)),
        ("aten::addmm", [[5], [3, 8], [8, 5]], 2 * (24 + 40 + 15)),
        ("slipstream::rms_norm", [[3, 8], [8], []], 2 * 48 + 32),
        ("slipstream::add_rms_norm", [[3, 8], [3, 8], [8], []], 2 * 96 + 32),
        ("slipstream::silu_and_mul", [[3, 8]], 2 * 36),
        ("slipstream::fused_linear", [[1, 8], [6, 8], [8], [], [], [], [1, 6]], 2 * (8 + 48 + 6 + 6) + 32),
        ("slipstream::store_slots", [[3, 2, 4], [3, 2, 4]], 2 * 4 * 24),
        ("aten::embedding", [[99, 8], [3]], 2 * 2 * 24),
    ],
)
def test_bytes_follow_from_shapes(op: str, shapes: list[list[int]], expected: int) -> None:
    assert bytes_of(op, shapes, 2) == expected


def test_unknown_bytes_have_no_figure() -> None:
    assert bytes_of("aten::sort", [[3, 8]], 2) is None
    assert all(bytes_of(op, [], 2) is None for op in FORMULAS)


def test_steps_are_counted_by_kind() -> None:
    counted = StepBytes(layer_weights=100, head_weights=10)
    counted.add([1, 1], [7, 9], token_bytes=2)
    counted.add([1, 5], [8, 5], token_bytes=2)
    assert (counted.num_steps, counted.num_decode_steps) == (2, 1)
    assert counted.bytes_of("native::decode") == 110 + 32
    assert counted.bytes_of("native::decoder_blocks") == 100 + 16 + 10
    assert counted.bytes_of("slipstream::paged_decode") == 32 + 16
    assert counted.bytes_of("slipstream::balanced_decode") == 32 + 16
    assert counted.bytes_of("slipstream::paged_prefill") == 10
    assert counted.bytes_of("aten::mm") is None and counted.total == 220 + 58


def test_a_table_says_what_is_in_it(plain: tuple[Profile, set[str]]) -> None:
    found, trace = plain[0], Path("trace.json")
    products = [row for row in found.rows if row.name == "aten::mm"]
    others = [row for row in found.rows if row.name != "aten::mm"]
    # Which ops of a tiny model take longest is chance.
    found = dataclasses.replace(found, rows=products + others)
    lines = list(describe_profile(found, trace))
    assert lines[0].startswith("4 steps of ") and "GB/s of a copy" in lines[0]
    assert lines[1].startswith("plan ") and "layers " in lines[1]
    assert any(line.startswith("aten::mm ") and "%" in line for line in lines)
    assert lines[-1].endswith(str(table_path(trace))) and " more: " in lines[-2]
    assert json.loads(found.to_json())["num_steps"] == 4


@pytest.mark.gpu
@pytest.mark.parametrize("is_eager", [True, False])
def test_a_gpu_shows_its_kernels(folder: Path, tmp_path: Path, is_eager: bool) -> None:
    options = {"device": "cuda", "dtype": "bfloat16", "enforce_eager": is_eager}
    profile_file.CEILING_BYTES["cuda"] = 1 << 28
    found, names = run(folder, tmp_path / "trace.json", **options)
    assert {"plan", "launch", "sample", "commit"} <= names and found.device == "cuda"
    kernels = [row for row in found.rows if row.kind == "kernel"]
    assert kernels and sum(row.share for row in kernels) <= 1.0
    if is_eager:
        known = [row for row in found.rows if row.kind == "op" and row.ceiling_share is not None]
        assert {"slipstream::balanced_decode", "slipstream::rotary_store"} <= {row.name for row in known}
