"""Does `slipstream warmup` run every shape of a step and say what came to which cache?"""

from __future__ import annotations

from pathlib import Path

import pytest

from slipstream.engine.assembly import assemble
from slipstream.engine.config import EngineConfig
from slipstream.engine.shape_tour import PLAIN_SIZES, visit_shapes
from slipstream.kernels import compiled_caches
from slipstream.kernels.compiled_caches import cache_folders, growth, look
from tests.cli.conftest import Slipstream

SMALL = ("--max-num-tokens", 64, "--max-batch-size", 4, "--max-seq-len", 128)


def test_the_caches_are_told(slipstream: Slipstream, tiny_path: str) -> None:
    finished = slipstream("warmup", tiny_path, *SMALL)
    assert finished.code == 0, finished.err
    lines = finished.out.splitlines()
    assert lines[0].startswith("kernels for CPUs: ") and str(cache_folders()["kernels for CPUs"]) in lines[0]
    assert " steps in " in lines[-1] and "on the cpu" in lines[-1] and "captured" not in lines[-1]
    assert "3 sizes of decode steps and 4 lengths of prompts, greedy" in finished.err
    assert "ready in" in finished.err


def test_every_size_and_length_is_met(tiny_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = EngineConfig(model=tiny_path, max_num_tokens=64, max_batch_size=4, max_seq_len=128)
    assembly = assemble(config)
    plans = []
    launch = assembly.engine.runner.launch
    monkeypatch.setattr(assembly.engine.runner, "launch", lambda plan: plans.append(plan) or launch(plan))
    assert visit_shapes(assembly) == len(plans) > 20
    decodes = {len(plan.spans) for plan in plans if all(span.len == 1 for span in plan.spans)}
    assert decodes == {size for size in PLAIN_SIZES if size <= 4}
    lone = {plan.spans[0].len for plan in plans if len(plan.spans) == 1}
    assert {16, 32, 64} <= lone and not assembly.engine.has_work
    assert any(init.sampling.logprobs == 5 for plan in plans for init in plan.added)


def test_growth_counts_new_files_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept, empty = tmp_path / "kept", tmp_path / "none"
    (kept / "deep").mkdir(parents=True)
    (kept / "old").write_bytes(b"1234")
    monkeypatch.setattr(compiled_caches, "cache_folders", lambda: {"kernels": kept, "others": empty})
    before = look()
    assert [cache.line() for cache in growth(before)] == [
        f"kernels: nothing new, 1 files there ({kept})",
        f"others: nothing to keep ({empty})",
    ]
    (kept / "deep" / "new").write_bytes(b"12345678")
    found = growth(before)[0]
    assert (found.num_new, found.new_bytes, found.num_kept) == (1, 8, 1)
    assert found.line() == f"kernels: 1 new files, 8 bytes ({kept})"


@pytest.mark.gpu
def test_a_second_warmup_compiles_nothing(slipstream: Slipstream, tiny_path: str) -> None:
    options = ("--device", "cuda", "--dtype", "bfloat16", *SMALL)
    assert slipstream("warmup", tiny_path, *options).code == 0
    finished = slipstream("warmup", tiny_path, *options)
    assert finished.code == 0, finished.err
    assert any(line.startswith("kernels for GPUs: nothing new") for line in finished.out.splitlines())
    assert "steps were captured" in finished.out
