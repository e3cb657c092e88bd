"""Callables and rules on tokens end to end: what they see, what they change, and whose error it is."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from slipstream import LLM, SamplingParams
from slipstream.core.errors import RequestError
from slipstream.core.request import Request
from slipstream.engine.assembly import assemble
from slipstream.engine.config import EngineConfig
from slipstream.engine.prompts import PromptEncoder
from slipstream.text.tokenizer import FastTokenizer
from tests.engine.tiny import byte_tokenizer, prompt_ids, run_requests, tiny_llama, write_folder

PROMPT = prompt_ids(30, seed=1)
PLAIN = SamplingParams(max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tiny_llama(), tmp_path_factory.mktemp("model"))


def params(**changes: object) -> SamplingParams:
    return SamplingParams(max_tokens=12, ignore_eos=True, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("overlap", [False, True], ids=["plain", "overlapped"])
def test_callables_see_every_token_however_deep_the_engine_runs(folder: Path, overlap: bool) -> None:
    seen: list[list[int]] = []

    def watch(token_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        seen.append(token_ids)
        # The second best: what comes out depends on this call.
        logits[logits.argmax()] = -torch.inf
        return logits

    with LLM(folder, disable_overlap_scheduler=not overlap) as llm:
        neighbours = [params() for _ in range(3)]
        outputs = llm.generate(
            [PROMPT, *(prompt_ids(9, seed=20 + i) for i in range(3)), PROMPT],
            [params(logits_processor=watch), *neighbours, params()],
        )
        stats = llm.get_stats()
        again = llm.generate(PROMPT, params(logits_processor=watch))
        llm.generate(PROMPT, PLAIN)
        later = llm.get_stats()
    tokens = outputs[0].outputs[0].token_ids
    assert seen[:12] == [tokens[:i] for i in range(12)]
    assert tokens == again.outputs[0].token_ids != outputs[4].outputs[0].token_ids
    # Nothing was ahead while it ran, and the engine is ahead again afterwards.
    assert stats["max_outstanding"] == 1 and later["max_outstanding"] == 1 + overlap


def test_a_late_arrival_gets_its_own_tokens_only(folder: Path) -> None:
    """Steps of a row's earlier tenant, collected after its number was given out again, are not its own."""
    assembly = assemble(EngineConfig(model=folder, max_batch_size=1, disable_overlap_scheduler=False))
    seen: list[list[int]] = []

    def watch(prompt: list[int], generated: list[int], logits: torch.Tensor) -> torch.Tensor:
        assert prompt == PROMPT
        seen.append(generated)
        return logits

    early, late = (
        Request.create(ids, one, assembly.limits, request_id=name)
        for name, ids, one in (("early", [9, 8, 7], PLAIN), ("late", PROMPT, params(logits_processor=watch)))
    )
    tokens = run_requests(assembly.engine, [early, late])
    assert assembly.engine.scheduler.stats.max_outstanding == 2
    assert seen == [tokens["late", 0][:i] for i in range(12)]
    assert not assembly.engine.runner.processors._processors, "callables of ended requests are let go"


def test_a_raising_callable_ends_its_own_request(folder: Path) -> None:
    def fail_late(token_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        if len(token_ids) == 4:
            raise KeyError("lost")
        return logits

    with LLM(folder) as llm:
        alone = llm.generate(PROMPT, PLAIN)
        outputs = llm.generate([PROMPT] * 3, [PLAIN, params(logits_processor=fail_late), PLAIN])
        stats = llm.get_stats()
        after = llm.generate(PROMPT, PLAIN)
    bad = outputs[1]
    assert bad.error is not None and bad.error.code == "processing_error" and "KeyError" in bad.error.message
    assert bad.outputs[0].finish_reason == "error"
    assert bad.outputs[0].token_ids == alone.outputs[0].token_ids[:4]
    for good in (outputs[0], outputs[2], after):
        assert good.error is None and good.outputs[0].token_ids == alone.outputs[0].token_ids
    assert stats["num_rewound"] == 0, "its pages are sound, so nobody who reads them starts again"


def test_samples_are_processed_each_by_itself(folder: Path) -> None:
    seen: list[tuple[int, ...]] = []

    def watch(token_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(token_ids))
        return logits

    with LLM(folder) as llm:
        output = llm.generate(PROMPT, params(n=3, temperature=6.0, seed=2, logits_processor=watch))
    wanted = [tuple(sample.token_ids[:i]) for sample in output.outputs for i in range(12)]
    assert sorted(seen) == sorted(wanted) and len({sample.text for sample in output.outputs}) == 3


def test_bad_texts_never_come(folder: Path) -> None:
    with LLM(folder) as llm:
        plain = llm.generate(PROMPT, PLAIN).outputs[0]
        pair = byte_tokenizer().decode(plain.token_ids[3:5])
        single = byte_tokenizer().decode(plain.token_ids[6:7])
        assert len(byte_tokenizer().encode(pair).ids) > 1 and pair in plain.text and single in plain.text
        once = llm.generate(PROMPT, params(bad=pair)).outputs[0]
        both = llm.generate(PROMPT, params(bad=[pair, single])).outputs[0]
    assert once.token_ids[:4] == plain.token_ids[:4], "only the token that completes it is kept out"
    assert once.token_ids[4] != plain.token_ids[4]
    assert pair not in once.text
    assert pair not in both.text and single not in both.text


def test_bad_texts_are_spelled_alone_and_after_a_space() -> None:
    tokenizer = FastTokenizer(byte_tokenizer())
    encode = PromptEncoder(tokenizer).encode_bad
    assert encode("ba") == [tokenizer.encode("ba"), tokenizer.encode(" ba")]
    assert encode(" ba") == [tokenizer.encode(" ba")]
    assert encode("\n") == [tokenizer.encode("\n")], "white space alone has no second spelling: a lone space"


def test_without_a_tokenizer_bad_texts_are_refused(folder: Path) -> None:
    with LLM(folder, skip_tokenizer_init=True) as llm:
        output = llm.generate(PROMPT, params(bad="x"))
        fine = llm.generate(PROMPT, params(bad_token_ids=[40]))
    assert output.error is not None and "bad_token_ids" in output.error.message
    assert fine.error is None


def test_ngrams_do_not_repeat_across_preemption_and_prompt(folder: Path) -> None:
    allowed = [50, 60, 70, 80, 90]
    rules = params(allowed_token_ids=allowed, no_repeat_ngram_size=2)
    prompt = [50, 60, 70, 50]
    with LLM(folder, disable_overlap_scheduler=False) as llm:
        output = llm.generate(prompt, rules)
        starved = llm.generate([50, 60, 50, 50], params(allowed_token_ids=[50, 60], no_repeat_ngram_size=2))
    tokens = prompt + output.outputs[0].token_ids
    pairs = list(itertools.pairwise(tokens))
    assert set(tokens) <= set(allowed) and len(pairs) == len(set(pairs))
    assert starved.error is not None and starved.error.code == "numerical_error"
    assert "no token is allowed" in starved.error.message


def test_prompts_are_truncated(folder: Path) -> None:
    with LLM(folder) as llm:
        cut = llm.generate(PROMPT, params(truncate_prompt_tokens=7))
        short = llm.generate(PROMPT[-7:], PLAIN)
        too_long = llm.generate(prompt_ids(2000, seed=3), params(truncate_prompt_tokens=-1))
        limit = llm.startup.limits.max_seq_len
    assert cut.prompt_token_ids == PROMPT[-7:]
    assert cut.outputs[0].token_ids == short.outputs[0].token_ids
    assert too_long.error is None and len(too_long.prompt_token_ids) == limit - 12


def test_a_refused_processor_names_itself(folder: Path) -> None:
    with LLM(folder) as llm, pytest.raises(RequestError, match=r"logits_processor\[0\] takes 1 arguments"):
        llm.generate(PROMPT, params(logits_processor=lambda x: x), raise_on_error=True)


def test_best_of_returns_the_likeliest_samples(folder: Path) -> None:
    drawn = {"temperature": 6.0, "seed": 5}
    with LLM(folder) as llm:
        every = llm.generate(PROMPT, params(n=6, logprobs=0, **drawn)).outputs
        best = llm.generate(PROMPT, params(n=2, best_of=6, **drawn)).outputs
    order = sorted(every, key=lambda sample: -(sample.cumulative_logprob or 0.0))
    assert [sample.token_ids for sample in best] == [sample.token_ids for sample in order[:2]]
    assert best[0].logprobs is None and best[0].cumulative_logprob == order[0].cumulative_logprob
    assert order[0].index != 0, "else the first samples would do"
