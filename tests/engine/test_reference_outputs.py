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

SMOLLM2 = "smollm2-135m-instruct-q4_1"
GEMMA3 = "gemma-3-270m-q4_k_m"
TIE = 1e-3
MAX_EXCUSED = 2
MAX_TOKENS = 64
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
def model(request: pytest.FixtureRequest) -> Iterator[tuple[str, LLM]]:
    path = request.getfixturevalue("smollm2_path" if request.param == SMOLLM2 else "gemma3_path")
    with LLM(path, max_batch_size=16, max_num_tokens=MAX_NUM_TOKENS) as llm:
        assert llm.startup.resolved.dtype == "float32"
        yield request.param, llm


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


def test_raw_and_chat_prompts(model: tuple[str, LLM], reference_cases: list[Case]) -> None:
    name, llm = model
    cases = of_model(reference_cases, name)
    params = SamplingParams(max_tokens=MAX_TOKENS, skip_special_tokens=False, include_stop_str_in_output=True)
    raw = [case for case in cases if case["mode"] == "raw"]
    chat = [case for case in cases if case["mode"] == "chat"]
    assert len(raw) >= 2 and bool(chat) == (name == SMOLLM2)
    outputs = llm.generate([case["prompt"] for case in raw], params)
    if chat:
        outputs += llm.chat([[{"role": "user", "content": case["prompt"]}] for case in chat], params)
    excused = [
        assert_same(output, case) or output.outputs[0].text != case["text"]
        for output, case in zip(outputs, [*raw, *chat], strict=True)
    ]
    assert sum(excused) <= MAX_EXCUSED


def test_rendered_chats_are_the_recorded_ones(model: tuple[str, LLM], reference_cases: list[Case]) -> None:
    name, llm = model
    for case in of_model(reference_cases, name):
        if case["mode"] == "chat":
            output = llm.chat([{"role": "user", "content": case["prompt"]}], SamplingParams(max_tokens=1))
            assert output.prompt == case["rendered_prompt"]


def test_long_prompts_other_scripts_and_several_turns(model: tuple[str, LLM], own_cases: list[Case]) -> None:
    name, llm = model
    cases = of_model(own_cases, name)
    lengths = [len(case["prompt_token_ids"]) for case in cases]
    assert max(lengths) > GEMMA_WINDOW + 100
    assert any(not str(case["prompt"]).isascii() for case in cases)
    excused = 0
    for case in cases:
        params = SamplingParams(max_tokens=32)
        is_chat = not isinstance(case["prompt"], str)
        output = llm.chat(case["prompt"], params) if is_chat else llm.generate(case["prompt"], params)
        is_excused = assert_same(output, case)
        excused += is_excused
        assert is_excused or output.outputs[0].text == case["text"]
    assert excused <= 1


def test_long_prompt_in_chunks_beside_others(model: tuple[str, LLM], own_cases: list[Case]) -> None:
    """A prompt longer than the window, computed in chunks by an engine that is decoding meanwhile."""
    name, llm = model
    long = max(of_model(own_cases, name), key=lambda case: len(case["prompt_token_ids"]))
    before = llm.get_stats()
    beside = [
        llm.generate_async([5 + i, 6, 7], SamplingParams(max_tokens=40, ignore_eos=True)) for i in range(3)
    ]
    output = llm.generate(
        {"prompt_token_ids": long["prompt_token_ids"]}, SamplingParams(max_tokens=32, cache_salt="chunks")
    )
    assert not assert_same(output, long)
    assert all(one.result(120).outputs[0].finish_reason == "length" for one in beside)
    stats = llm.get_stats()
    num_admitted = stats["num_admissions"] - before["num_admissions"]
    assert stats["num_chunks"] - before["num_chunks"] > num_admitted == 4
