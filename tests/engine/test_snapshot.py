"""Does a snapshot stand for every plan before it?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from slipstream.core.plan import decode_plan, encode
from slipstream.core.sampling_params import SamplingParams
from slipstream.engine.engine import Engine
from slipstream.engine.runner import Runner
from slipstream.engine.snapshot import snapshot
from slipstream.llm import LLM
from tests.engine import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("snapshot") / "llama"
    return tiny.write_folder(tiny.tiny_llama(), path)


def fresh_runner(runner: Runner) -> Any:
    """Return a runner with empty rows over a copy of the same pages."""
    twin = Runner(
        runner.model,
        runner.groups,
        num_pages=runner.pages.shape[0],
        max_batch_size=runner.rows.tokens.shape[0],
        max_seq_len=runner.rows.tokens.shape[1] - 1,
        kv_dtype=runner.pages.dtype,
        device=torch.device("cpu"),
        backend=runner.backend,
    )
    twin.pages.copy_(runner.pages)
    return twin


def test_fresh_runner_with_a_snapshot_repeats_the_next_step(folder: Path) -> None:
    with LLM(model=str(folder)) as llm:
        engine: Engine = llm.startup.engine
        limits = llm.startup.limits
    requests = [
        tiny.Request.create(
            list(range(10, 10 + length)),
            SamplingParams(
                max_tokens=12, ignore_eos=True, temperature=0.7 * (idx % 2), seed=idx, repetition_penalty=1.2
            ),
            limits,
            request_id=str(idx),
        )
        for idx, length in enumerate((5, 40, 33, 70))
    ]
    for request in requests:
        engine.submit(request)
    for _ in range(6):
        engine.step()
    assert len(engine.scheduler.running()) == 4
    state = snapshot(engine.scheduler, step_id=0)
    twin = fresh_runner(engine.runner)  # type: ignore[arg-type]
    plan = engine.scheduler.plan()
    assert plan is not None
    results = []
    for runner, plans in ((engine.runner, [plan]), (twin, [state, plan])):
        for one in plans:
            handle = runner.launch(decode_plan(encode(one)))
            runner.sample(handle)
            result = runner.collect(handle)
        results.append(result.tokens)
    assert len(results[0]) == 4
    assert results[0] == results[1]
