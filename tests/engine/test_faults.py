"""Is a request whose step failed told which op or how much memory it was, and does the engine go on?"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from slipstream import LLM, RequestError, SamplingParams
from slipstream.engine.faults import describe_fault, op_at_fault
from slipstream.kernels import KernelCapability, register_kernel, unregister_kernel
from slipstream.kernels.rms_norm import rms_norm
from slipstream.kernels.rotary_store import rotary_store
from tests.bench.tiny_checkpoint import write_checkpoint

CPU = KernelCapability(devices=frozenset({"cpu"}))
GREEDY = SamplingParams(max_tokens=4, ignore_eos=True)
OOM = torch.OutOfMemoryError(
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.10 GiB of which "
    "1.25 GiB is free. Process 1 has 77 GiB memory in use."
)


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    folder = write_checkpoint(tmp_path_factory.mktemp("tiny"))
    with LLM(str(folder), dtype="float32", attn_backend="torch") as llm:
        yield llm


def failing(function: Callable[..., Any], error: Exception, *, at: int) -> Callable[..., Any]:
    """Return the function, raising `error` from its `at`-th call on."""
    calls = [0]

    @functools.wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        calls[0] += 1
        if calls[0] >= at:
            raise error
        return function(*arguments, **named)

    return call


def fail_once(llm: LLM) -> RequestError:
    output = llm.generate("a", GREEDY)
    assert output.error is not None
    return output.error


def test_a_kernel_from_outside_is_named_and_the_engine_goes_on(llm: LLM) -> None:
    before = llm.generate("a", GREEDY).outputs[0].token_ids
    broken = failing(rms_norm, ValueError("secret of the kernel"), at=6)
    register_kernel(broken, op="rms_norm", name="broken", capability=CPU)
    try:
        message = str(fail_once(llm))
    finally:
        unregister_kernel("broken")
    assert "the step failed: op 'rms_norm' in the kernel 'broken': ValueError" in message
    assert "secret" not in message
    assert llm.generate("a", GREEDY).outputs[0].token_ids == before


def test_an_op_of_ours_is_named(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any) -> None:
        raise RuntimeError("no image for this device")

    monkeypatch.setattr("slipstream.kernels.paged_attention._attend_span", broken)
    monkeypatch.setattr("slipstream.kernels.paged_attention._attend_rows", broken)
    assert "the step failed: RuntimeError in op 'paged_attention'" in str(fail_once(llm))


def test_running_out_of_memory_fails_the_requests_of_the_step_alone(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an allocator hook of a full GPU would raise, out of the middle of a layer."""
    before = llm.generate(["a", "b"], GREEDY)
    model = llm.startup.engine.runner.model
    layer = model.layers[1]
    with monkeypatch.context() as patched:
        patched.setattr(layer, "forward", failing(layer.forward, OOM, at=3))
        outputs = llm.generate(["a", "b"], GREEDY)
    for output in outputs:
        assert output.error is not None and output.finished
        message = str(output.error)
        assert "out of memory, 2.50 GiB needed and 1.25 GiB free; lower max_num_tokens" in message
    after = llm.generate(["a", "b"], GREEDY)
    assert [o.outputs[0].token_ids for o in after] == [o.outputs[0].token_ids for o in before]
    stats = llm.get_stats()
    assert stats["num_free_pages"] == stats["num_pages"] and stats["num_running"] == 0


def test_sampling_out_of_memory_is_told_too(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = llm.startup.engine.runner.sampler
    monkeypatch.setattr(sampler, "sample", failing(sampler.sample, OOM, at=2))
    assert "sampling failed: out of memory, 2.50 GiB needed" in str(fail_once(llm))


def test_a_message_without_figures_still_names_the_knobs() -> None:
    told = describe_fault(MemoryError())
    assert told.startswith("the step failed: out of memory, more memory needed than there is; lower max_num")


def test_faults_outside_our_ops_have_no_op() -> None:
    with pytest.raises(ValueError) as raised:
        int("x")
    assert op_at_fault(raised.value) == "" and describe_fault(raised.value) == "the step failed: ValueError"
    norms = torch.ones(5), torch.ones(5)
    kv, slots = torch.zeros(1, 2, 4, 1, 8), torch.zeros(1).long()
    with pytest.raises(RuntimeError) as nested:
        rotary_store(torch.ones(1, 24), torch.ones(4, 2, 8), slots, *norms, 1e-6, False, 1, kv, slots)
    assert op_at_fault(nested.value) == "rotary_store"
    with pytest.raises(RuntimeError) as raised_inside:
        rms_norm(torch.ones(1, 4), torch.ones(5), 1e-6)
    assert describe_fault(raised_inside.value) == "the step failed: RuntimeError in op 'rms_norm'"
