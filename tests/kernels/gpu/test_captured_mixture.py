"""Do a GPU's kernels get along with the padding of captured steps? All of them, over whole requests.

Unused rows of length 0, tokens without a slot, tiles that begin behind every span: what a captured step holds
beside the plan's own. Here the kernels are interpreted; on a GPU `tests/engine/test_graphs.py` replays them.
"""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from slipstream import SamplingParams
from slipstream.attention import triton as backend_file
from slipstream.attention import triton_invariant as invariant_file
from slipstream.core.request import Request
from slipstream.engine import graphs as graphs_file
from slipstream.engine.assembly import assemble
from slipstream.engine.config import EngineConfig
from slipstream.engine.step_shapes import StepShapes
from tests.engine.fake_capture import captured_engine
from tests.engine.test_graphs import ON_CPU
from tests.engine.tiny import prompt_ids, run_requests, tiny_gemma3, tiny_llama, write_folder
from tests.kernels.gpu.conftest import HAS_GPU

BOUNDS = {"max_batch_size": 4, "max_num_tokens": 40, "max_seq_len": 64}
# By the files whose ops they are; each kernel has the name of its file.
KERNELS = {
    graphs_file: ("decode_inputs", "span_inputs", "greedy_append"),
    backend_file: ("paged_prefill", "rotary_store", "store_slots", "balanced_decode", "decode_borders"),
    invariant_file: ("paged_prefill",),
}


def mixture(limits: Any) -> list[Request]:
    """A prompt in pieces beside rows that decode, some greedy and some not."""
    fields: list[dict[str, Any]] = [{}, {"temperature": 1.0, "seed": 1, "top_k": 9}, {}, {"logprobs": 1}]
    made: list[Request] = []
    for i, (length, extra) in enumerate(zip((5, 17, 50, 30), fields, strict=True)):
        params = SamplingParams(max_tokens=3, ignore_eos=True, **extra)
        made.append(Request.create(prompt_ids(length, seed=i), params, limits, request_id=f"r{i}"))
    return made


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Put kernels in the place of the definitions, and count how often each runs."""
    counted: Counter[str] = Counter()

    def counting(name: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            counted[name] += 1
            return kernel(*arguments)

        return run

    for file, names in KERNELS.items():
        for name in names:
            kernel = getattr(importlib.import_module(f"slipstream.kernels.gpu.{name}"), name)
            monkeypatch.setattr(file, f"{name}_op", counting(name, kernel))
    return counted


@pytest.mark.slow
@pytest.mark.skipif(HAS_GPU, reason="kernels run on the GPU here")
@pytest.mark.parametrize("make", [tiny_llama, tiny_gemma3], ids=["llama", "gemma3"])
def test_kernels_leave_padding_alone(
    make: Callable[[], Any], tmp_path: Path, calls: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"model": str(write_folder(make(), tmp_path)), **ON_CPU, **BOUNDS}
    plain = assemble(EngineConfig(**options))
    expected = run_requests(plain.engine, mixture(plain.limits))
    assert not calls
    assembly = assemble(EngineConfig(**options))
    shapes = StepShapes.create((4,), has_padding=True, max_num_tokens=40, max_seq_len=64)
    engine = captured_engine(assembly, shapes, monkeypatch)
    engine.runner.capture_within(60.0)
    assert run_requests(engine, mixture(assembly.limits)) == expected
    steps = engine.scheduler.stats.num_plans
    assert engine.runner.counters["num_graph_steps"] == steps == calls["greedy_append"]
    assert calls["span_inputs"] >= 3 and calls["balanced_decode"] > steps and calls["paged_prefill"] > 6
