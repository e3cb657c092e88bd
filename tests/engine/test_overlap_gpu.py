"""Does the host ever wait for a GPU between two launches? torch raises on every synchronising call.

Marked `gpu`. The first steps of a shape may allocate and are left out; collecting waits, by design, for the
copies of its own step alone. The forward is left out too: whether attention waits is its backend's business.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from slipstream import SamplingParams
from slipstream.core.request import Request
from slipstream.engine.assembly import assemble
from slipstream.engine.config import EngineConfig
from tests.engine.tiny import prompt_ids, tiny_llama, write_folder

EVERY_KIND = [
    {},
    {"temperature": 1.0, "seed": 1, "top_p": 0.9},
    {"repetition_penalty": 1.3, "logprobs": 3},
    {"no_repeat_ngram_size": 2, "bad_token_ids": [40], "logit_bias": {50: 1.0}},
    {"allowed_token_ids": list(range(100)), "min_tokens": 4, "return_generation_logits": True},
    {"prompt_logprobs": 2, "return_context_logits": True},
]


@pytest.mark.gpu
@pytest.mark.parametrize("changes", [EVERY_KIND[:1], EVERY_KIND], ids=["greedy", "every kind"])
def test_nothing_waits_between_launches(
    tmp_path: Path, changes: list[dict], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_folder(tiny_llama(), tmp_path)
    assembly = assemble(EngineConfig(model=folder, device="cuda", dtype="float32", max_num_tokens=48))
    engine = assembly.engine
    scheduler, runner = engine.scheduler, engine.runner
    forward, is_timed = runner.model.forward, False

    def unwatched(batch):
        torch.cuda.set_sync_debug_mode("default")
        hidden_TD = forward(batch)
        torch.cuda.set_sync_debug_mode("error" if is_timed else "default")
        return hidden_TD

    monkeypatch.setattr(runner.model, "forward", unwatched)
    expected = {}
    for name in ("warm", "timed"):
        handles, tokens = [], {}
        for i, fields in enumerate(changes):
            params = SamplingParams(max_tokens=12, ignore_eos=True, **fields)
            ids = prompt_ids(30 + i, seed=i)
            scheduler.submit(Request.create(ids, params, assembly.limits, request_id=f"{name}{i}"))
        while scheduler.has_work:
            is_timed = name == "timed"
            torch.cuda.set_sync_debug_mode("error" if is_timed else "default")
            try:
                while len(handles) < 2 and (plan := scheduler.plan()) is not None:
                    handles.append(runner.launch(plan))
                    runner.sample(handles[-1])
            finally:
                torch.cuda.set_sync_debug_mode("default")
            assert all(handle.error is None for handle in handles)
            for event in scheduler.commit(runner.collect(handles.pop(0))):
                tokens.setdefault(int(event.request_id.removeprefix(name)), []).extend(event.new_token_ids)
        expected[name] = tokens
    assert scheduler.stats.max_outstanding == 2
    assert expected["warm"] == expected["timed"]
    assert [len(expected["timed"][i]) for i in range(len(changes))] == [12] * len(changes)
