"""Does a step that is one native call give rows the bits of any other, and leave the rest alone?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from slipstream import LLM, SamplingParams
from slipstream.engine.native_steps import NativeSteps
from tests.engine.tiny import prompt_ids, tiny_gemma3, tiny_llama
from tests.models.gguf_twins import write_gguf
from tests.models.twins import make_gptj

MAKERS = {"llama": tiny_llama, "gemma3": tiny_gemma3, "gptj": make_gptj}
# Below the smallest of the vocabularies.
PROMPTS = [[token % 100 for token in prompt_ids(5 + 19 * i, seed=i)] for i in range(4)]


@pytest.fixture(scope="module", params=sorted(MAKERS))
def file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(MAKERS[request.param](), tmp_path_factory.mktemp("model") / "tiny.gguf", quantize=True)


def logits_of(llm: LLM, params: list[SamplingParams]) -> list[tuple[list[int], torch.Tensor]]:
    outputs = llm.generate(PROMPTS, params, raise_on_error=True)
    return [(out.outputs[0].token_ids, out.outputs[0].generation_logits) for out in outputs]


def greedy(**changes: Any) -> list[SamplingParams]:
    return [SamplingParams(max_tokens=12, ignore_eos=True, **changes) for _ in PROMPTS]


def test_greedy_steps_choose_as_the_general_way_does(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with LLM(file, skip_tokenizer_init=True) as llm:
        native = [out.outputs[0].token_ids for out in llm.generate(PROMPTS, greedy(), raise_on_error=True)]
        stats = llm.get_stats()
        assert stats["num_native_steps"] == stats["num_plans"]
    monkeypatch.setattr(NativeSteps, "shape_of", lambda self, plan, **asked: None)
    with LLM(file, skip_tokenizer_init=True) as llm:
        general = [out.outputs[0].token_ids for out in llm.generate(PROMPTS, greedy(), raise_on_error=True)]
    assert native == general
    assert len({token for tokens in native for token in tokens}) >= 8


def test_logits_have_the_same_bits(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[torch.Tensor]] = []
    for is_native in (True, False):
        found: list[torch.Tensor] = []
        if not is_native:
            monkeypatch.setattr(NativeSteps, "shape_of", lambda self, plan, **asked: None)

        def keep(_: list[int], logits: torch.Tensor, into: list[torch.Tensor] = found) -> torch.Tensor:
            into.append(logits.clone())
            return logits

        with LLM(file, skip_tokenizer_init=True) as llm:
            llm.generate([PROMPTS[2]], greedy(logits_processor=keep)[:1], raise_on_error=True)
        seen.append(found)
    assert len(seen[0]) == len(seen[1]) == 12
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))


def test_other_requests_go_their_usual_way(file: Path) -> None:
    wanted = greedy(temperature=0.8, seed=3, logprobs=2)
    with LLM(file, skip_tokenizer_init=True) as llm:
        pairs = zip(PROMPTS, wanted, strict=True)
        alone = [llm.generate([p], w, raise_on_error=True)[0].outputs[0] for p, w in pairs]
        mixed = llm.generate(PROMPTS + PROMPTS, wanted + greedy(), raise_on_error=True)
        assert [out.outputs[0].token_ids for out in mixed[:4]] == [out.token_ids for out in alone]
        assert all(len(out.outputs[0].logprobs) == 12 for out in mixed[:4])
        with_logits = logits_of(llm, greedy(return_generation_logits=True))
        assert all(logits.shape[0] == 12 for _, logits in with_logits)
        assert [tokens for tokens, _ in with_logits] == [out.outputs[0].token_ids for out in mixed[4:]]
