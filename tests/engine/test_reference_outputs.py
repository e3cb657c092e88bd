"""Do the real models say what transformers says? Law 3 of determinism, float32, through the Python API.

Tokens must be equal up to the first position whose two best logits lie within 1e-3 of each other: there, two
correct float32 implementations may choose differently. That excuse is counted, and at most two cases may need
it. Where tokens are equal, text is.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from slipstream import LLM, RequestOutput, SamplingParams
from slipstream.engine.generation import Generation

SMOLLM2 = "smollm2-135m-instruct-q4_1"
GEMMA3 = "gemma-3-270m-q4_k_m"
TIE = 1e-3
MAX_EXCUSED = 2
MAX_TOKENS = 64
OWN_MAX_TOKENS = 32
GEMMA_WINDOW = 512
# Smaller than the long prompts, so that those run in chunks.
MAX_NUM_TOKENS = 256

Case = dict[str, Any]


@pytest.fixture(scope="module")
def own_cases() -> list[Case]:
    """Cases that `tests/data/make_reference.py` made: long prompts, text outside ASCII, several turns."""
    path = Path(__file__).parent.parent / "data" / "own_reference.json"
    return json.loads(path.read_text(encoding="utf-8"))["cases"]


@pytest.fixture(scope="module", params=[SMOLLM2, GEMMA3])
def model(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, LLM]]:
    path = request.getfixturevalue("smollm2_path" if request.param == SMOLLM2 else "gemma3_path")
    with pytest.MonkeyPatch.context() as patch:
        # Keep the user's own cache of tokenizers out of the tests.
        patch.setenv("SLIPSTREAM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield from started(request.param, path)


def started(name: str, path: Path) -> Iterator[tuple[str, LLM]]:
    with LLM(path, dtype="float32", max_batch_size=16, max_num_tokens=MAX_NUM_TOKENS) as llm:
        assert llm.startup.resolved.dtype == "float32"
        yield name, llm


def of_model(cases: list[Case], name: str) -> list[Case]:
    return [case for case in cases if case["model"] == name]


def assert_same(output: RequestOutput, case: Case) -> bool:
    """Compare one output; returns whether a tie had to excuse it."""
    assert output.error is None
    assert output.prompt_token_ids == case["prompt_token_ids"]
    given, expected = output.outputs[0].token_ids, case["output_token_ids"]
    gaps = case["top1_top2_logit_gap"]
    tie = next((i for i, gap in enumerate(gaps) if gap < TIE), len(gaps))
    assert given[:tie] == expected[:tie]
    if given != expected:
        assert tie < len(gaps), f"{len(given)} tokens instead of {len(expected)}"
        return True
    is_stopped = case.get("stopped_on_eos", len(expected) < len(gaps))
    assert not is_stopped or output.outputs[0].finish_reason == "stop"
    return False


def test_recorded_prompts_all_in_one_batch(
    model: tuple[str, LLM], reference_cases: list[Case], own_cases: list[Case]
) -> None:
    """Raw prompts and chats together; those longer than a step (and than Gemma's window) run in chunks."""
    name, llm = model
    cases = of_model(reference_cases, name) + of_model(own_cases, name)
    assert max(len(case["prompt_token_ids"]) for case in cases) > GEMMA_WINDOW + 100
    assert any(not str(case["prompt"]).isascii() for case in cases)
    generations = [start(llm, case) for case in cases]
    excused = 0
    for case, generation in zip(cases, generations, strict=True):
        output = generation.result(timeout=200)
        is_excused = assert_same(output, case)
        excused += is_excused
        assert is_excused or output.outputs[0].text == case["text"]
        if "rendered_prompt" in case:
            assert output.prompt == case["rendered_prompt"]
    assert excused <= MAX_EXCUSED
    stats = llm.get_stats()
    assert stats["num_chunks"] > stats["num_admissions"] == len(cases)
    assert stats["executed_tokens"] > 4 * stats["num_plans"]


def start(llm: LLM, case: Case) -> Generation:
    """Submit a case as it was recorded: own cases show text as a user sees it, the others every token."""
    is_own = "label" in case
    params = SamplingParams(
        max_tokens=OWN_MAX_TOKENS if is_own else MAX_TOKENS,
        skip_special_tokens=is_own,
        include_stop_str_in_output=not is_own,
    )
    prompt = case["prompt"]
    if not isinstance(prompt, str):
        return llm.chat_async(prompt, params)
    if case.get("mode") == "chat":
        return llm.chat_async([{"role": "user", "content": prompt}], params)
    return llm.generate_async(prompt, params)
