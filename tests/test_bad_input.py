"""What does a bad request do to the others? Nothing: each row here runs beside four victims.

Test names carry the row of our reliability table (`test_r05_...`). While a row does its worst, four greedy
streams must say exactly what they say undisturbed; then a canary is answered, and free pages, threads and
file descriptors are back where they were. Rows that need a device or a server have their tests elsewhere:
R43 (a copy not yet drained) is `tests/engine/test_scheduler_faults.py` and its fake runner.
"""

from __future__ import annotations

import dataclasses
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slipstream import LLM, KvCacheConfig, RequestError, RequestOutput, SamplingParams
from slipstream.core.batch import ForwardBatch
from slipstream.core.plan import StepPlan
from slipstream.engine.runner import Runner
from slipstream.sampling.sampler import Sampler
from slipstream.text.detokenizer import IncrementalDetokenizer
from tests.engine.oracle import DEADLINE_S, MARK, SHORT, VICTIM_PARAMS, VICTIMS, Oracle, first_update
from tests.engine.tiny import (
    VOCAB,
    anonymous_bytes,
    one_thread,
    prompt_ids,
    tiny_llama,
    wait_idle,
    write_folder,
)

MAX_SEQ_LEN = 256
FORCE_MARK = {MARK: 100.0}
INTEGERS = [-1, 0, 10**9, 2**63, -(2**70)]
NO_INTEGERS = [True, 1.5, "3", float("nan"), [1], {}]


@pytest.fixture(scope="module", autouse=True)
def single_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tiny_llama(), tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def oracle(folder: Path) -> Iterator[Oracle]:
    with LLM(folder, max_seq_len=MAX_SEQ_LEN, disable_overlap_scheduler=False) as llm:
        yield Oracle(llm)


def test_the_oracle_notices_a_victim_that_says_something_else(folder: Path) -> None:
    with LLM(folder) as llm:
        oracle = Oracle(llm)
        weight = llm.startup.engine.runner.model.layers[1].attention.qkv.weight  # type: ignore[attr-defined]
        with pytest.raises(AssertionError, match="something else"), oracle.victims(), torch.inference_mode():
            weight[0, 0] += 0.5


@pytest.mark.skipif(sys.platform != "linux", reason="counts in /proc")
def test_the_oracle_notices_what_is_left_open(folder: Path) -> None:
    with LLM(folder) as llm:
        oracle = Oracle(llm)
        left: list[Any] = []
        with pytest.raises(AssertionError, match="files are left open"), oracle.victims():
            left.append((folder / "config.json").open())
        left.pop().close()
        is_over = threading.Event()
        thread = threading.Thread(target=is_over.wait)
        with pytest.raises(AssertionError, match="threads are left"), oracle.victims():
            thread.start()
        is_over.set()
        thread.join()
        oracle.check_rest()


@pytest.mark.parametrize(
    "text",
    ["\x00", "a\x00b", "\ud800", "ok \udfff", "\U0001f642" * 250_000, "\ufeff\u202e\u0000", "a" * 1_000_000],
    ids=["nul", "nul-inside", "surrogate", "surrogate-inside", "1MB-emoji", "marks", "1MB-word"],
)
def test_r05_odd_texts_are_answered_or_refused(oracle: Oracle, text: str) -> None:
    with oracle.victims():
        started = time.monotonic()
        output = oracle.llm.generate(text, SHORT)
        assert output.finished and time.monotonic() - started < DEADLINE_S
        if len(text) > 1000:
            assert output.error is not None and output.error.code == "context_length_exceeded"
            assert len(output.error.message) < 600
        elif output.error is None:
            assert len(output.outputs[0].token_ids) == 3
        else:
            assert output.error.param == "prompt"


def refused_at_once(oracle: Oracle, prompts: list[Any]) -> None:
    for prompt in prompts:
        with pytest.raises(RequestError):
            oracle.llm.generate_async(prompt)


def test_r05_what_is_no_prompt_is_refused(oracle: Oracle) -> None:
    with oracle.victims():
        refused_at_once(oracle, [b"bytes", bytearray(b"x"), 7, 1.5, None, object(), {1, 2}])


def test_r05_any_text_at_all(oracle: Oracle) -> None:
    @settings(max_examples=40, deadline=None, derandomize=True, database=None)
    @given(st.text(st.characters(), max_size=60))
    def check(text: str) -> None:
        output = oracle.llm.generate(text, SHORT)
        assert output.finished and (output.error is None) == (len(output.outputs[0].token_ids) == 3)

    with oracle.victims():
        check()


def test_r06_empty_prompts_are_refused(oracle: Oracle) -> None:
    with oracle.victims():
        empty = ["", [], {}, {"prompt": None}, {"prompt": ""}, {"prompt_token_ids": []}, {"text": "x"}]
        refused_at_once(oracle, empty)


def test_r06_an_empty_prompt_in_a_list_fails_alone(oracle: Oracle) -> None:
    with oracle.victims():
        empty, fine = oracle.llm.generate([[], VICTIMS[0]], VICTIM_PARAMS)
        assert empty.error is not None and fine.outputs[0].token_ids == oracle.expected[0]
        for prompts in ([], ()):
            with pytest.raises(RequestError, match="No prompt"):
                oracle.llm.generate(prompts)
        assert oracle.llm.generate([[]])[0].error is not None


BAD_CHATS: list[Any] = [
    [],
    [{"role": "user", "content": None}],
    [{"role": "user"}],
    [{"content": "x"}],
    [{"role": 3, "content": "x"}],
    [{"role": "user", "content": [{"type": "image_url", "image_url": "file:///etc/passwd"}]}],
    [{"role": "user", "content": "\ud800"}],
    [{}],
    [[]],
]


def test_r06_bad_messages_are_refused(oracle: Oracle) -> None:
    with oracle.victims():
        for messages in BAD_CHATS:
            with pytest.raises(RequestError):
                oracle.llm.chat_async(messages)


BAD_IDS: list[Any] = [-1, VOCAB, 2**31, 2**63, -(2**63), 1.0, 1.5, True, None, "5", [5]]


def test_r07_bad_token_ids_are_refused(oracle: Oracle) -> None:
    with oracle.victims():
        for bad in BAD_IDS:
            for prompt in ([5, bad, 6], {"prompt_token_ids": [5, bad]}):
                oracle.refuses(prompt, param="prompt_token_ids")
                refused_at_once(oracle, [prompt])


def test_r07_arrays_of_ids_are_checked_too(oracle: Oracle) -> None:
    with oracle.victims():
        for array in (np.array([5, -1]), np.array([5.0]), np.array([[5]]), torch.tensor([5, VOCAB])):
            oracle.refuses({"prompt_token_ids": array})
        fine = oracle.llm.generate({"prompt_token_ids": np.array(VICTIMS[0])}, VICTIM_PARAMS)
        assert fine.outputs[0].token_ids == oracle.expected[0]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
@pytest.mark.parametrize("field", ["n", "best_of"])
def test_r08_a_billion_samples_cost_nothing(oracle: Oracle, field: str) -> None:
    with oracle.victims():
        before = anonymous_bytes()
        oracle.refuses([5], param=field, **{field: 10**9})
        # One million objects would be a hundred times this.
        assert anonymous_bytes() - before < 4 * 1024**2
        for value in [*INTEGERS, *NO_INTEGERS]:
            oracle.refuses([5], param=field, **{field: value})


def test_r10_bad_max_tokens_are_refused(oracle: Oracle) -> None:
    with oracle.victims():
        for value in [*INTEGERS, *NO_INTEGERS]:
            oracle.refuses([5], param="max_tokens", max_tokens=value)


def test_r10_prompt_and_output_fit_the_context_exactly(oracle: Oracle) -> None:
    prompt = prompt_ids(MAX_SEQ_LEN - 5, seed=1)
    with oracle.victims():
        assert len(oracle.llm.generate(prompt, SamplingParams(max_tokens=5, ignore_eos=True)).outputs) == 1
        error = oracle.refuses(prompt, param="max_tokens", code="context_length_exceeded", max_tokens=6)
        assert str(MAX_SEQ_LEN) in error.message and str(len(prompt)) in error.message
        filled = oracle.llm.generate(prompt, SamplingParams(max_tokens=None, ignore_eos=True)).outputs[0]
        assert (len(filled.token_ids), filled.finish_reason) == (5, "length")
        for length in (MAX_SEQ_LEN, MAX_SEQ_LEN + 1, 100_000):
            error = oracle.refuses([5] * length, code="context_length_exceeded", max_tokens=1)
            assert str(length) in error.message


@pytest.mark.parametrize("field", ["logprobs", "prompt_logprobs"])
def test_r11_bad_logprobs_are_refused(oracle: Oracle, field: str) -> None:
    with oracle.victims():
        for value in [-1, 65, 10**9, 2**63, *NO_INTEGERS]:
            oracle.refuses([5], param=field, **{field: value})


def test_r11_the_cap_of_logprobs_is_served_at_a_full_batch(oracle: Oracle) -> None:
    params = SamplingParams(max_tokens=4, logprobs=64, ignore_eos=True)
    with oracle.victims():
        for output in oracle.llm.generate([prompt_ids(30, seed=i) for i in range(60)], params):
            logprobs = output.outputs[0].logprobs
            assert logprobs is not None and [len(entry) for entry in logprobs] == [64] * 4


NAN, INF = float("nan"), float("inf")
BAD_IDS_AND_BIASES: list[tuple[str, Any]] = [
    ("logit_bias", {VOCAB: 1.0}),
    ("logit_bias", {-1: 1.0}),
    ("logit_bias", {5: float("nan")}),
    ("logit_bias", {5: float("-inf")}),
    ("logit_bias", {5: 1e308}),
    ("logit_bias", {"5": 1.0}),
    ("logit_bias", {5: "1"}),
    ("logit_bias", dict.fromkeys(range(1_000_000), 1.0)),
    ("logit_bias", [5]),
    ("stop_token_ids", [VOCAB]),
    ("stop_token_ids", [-1]),
    ("stop_token_ids", [True]),
    ("stop_token_ids", [5] * 1_000_000),
    ("stop_token_ids", 5),
    ("allowed_token_ids", [VOCAB]),
    ("allowed_token_ids", []),
    ("bad_token_ids", [-1]),
]


def test_r12_bad_ids_and_biases_are_refused(oracle: Oracle) -> None:
    with oracle.victims():
        for field, value in BAD_IDS_AND_BIASES:
            oracle.refuses([5], param=field, **{field: value})


OUT_OF_BOUNDS: list[tuple[str, list[Any]]] = [
    ("temperature", [NAN, INF, -1.0, 1e-40, 1e9, "1", True]),
    ("top_p", [NAN, 0.0, -0.1, 1.1, INF, "1"]),
    ("top_k", [2**31, -2, 1.5, NAN, True]),
    ("min_p", [NAN, -0.1, 1.1, INF]),
    ("repetition_penalty", [NAN, 0.0, -1.0, 1e308, INF]),
    ("presence_penalty", [NAN, 1e308, -1e308, INF]),
    ("frequency_penalty", [NAN, 1e308, -1e308, INF]),
    ("seed", [1.5, "1", 2**64, -(2**63) - 1, True, NAN]),
    ("min_tokens", [-1, 1.5, 33, 2**63]),
]


def test_r13_numbers_out_of_bounds_are_refused(oracle: Oracle) -> None:
    with oracle.victims():
        for field, values in OUT_OF_BOUNDS:
            for value in values:
                oracle.refuses([5], param=field, **{field: value})


def test_r13_every_allowed_corner_samples_a_token(oracle: Oracle) -> None:
    fields = st.fixed_dictionaries(
        {},
        optional={
            "temperature": st.sampled_from([0.0, 1e-3, 0.7, 100.0]),
            "top_p": st.sampled_from([5e-324, 1e-9, 0.5, 1.0]),
            "top_k": st.sampled_from([-1, 0, 1, VOCAB - 1, VOCAB, 2**31 - 1]),
            "min_p": st.sampled_from([0.0, 5e-324, 0.5, 1.0]),
            "repetition_penalty": st.sampled_from([0.01, 1.0, 100.0]),
            "presence_penalty": st.sampled_from([-100.0, 0.0, 100.0]),
            "frequency_penalty": st.sampled_from([-100.0, 100.0]),
            "logit_bias": st.sampled_from([{}, {5: 100.0}, dict.fromkeys(range(VOCAB), -100.0)]),
            "seed": st.sampled_from([0, -(2**63), 2**64 - 1]),
            "min_tokens": st.sampled_from([0, 3]),
            "stop_token_ids": st.sampled_from([[], [5], list(range(VOCAB - 1))]),
        },
    )

    @settings(max_examples=60, deadline=None, derandomize=True, database=None)
    @given(fields)
    def check(params: dict[str, Any]) -> None:
        output = oracle.llm.generate(VICTIMS[1], SamplingParams(max_tokens=3, **params))
        assert output.error is None
        assert 1 <= len(output.outputs[0].token_ids) <= 3
        assert all(0 <= token < VOCAB for token in output.outputs[0].token_ids)

    with oracle.victims():
        check()


def test_r14_bad_stop_strings_are_refused(oracle: Oracle) -> None:
    with oracle.victims():
        for stop in ("", [""], ["x", ""], ["x"] * 10_000, "x" * 2**20, 5, [5], [None], b"x", "\ud800"):
            oracle.refuses([5], param="stop", stop=stop)


def test_r14_the_worst_allowed_stops_are_served(oracle: Oracle) -> None:
    stops = ["a" * 1000 + chr(0x4E00 + i) for i in range(64)]
    with oracle.victims():
        output = oracle.llm.generate(VICTIMS[0], dataclasses.replace(VICTIM_PARAMS, stop=stops))
        assert output.outputs[0].token_ids == oracle.expected[0]


def marked(oracle: Oracle, **params: Any) -> RequestOutput:
    """Run a request that says MARK and nothing else."""
    given = {"max_tokens": 6, "ignore_eos": True, "logit_bias": FORCE_MARK} | params
    return oracle.llm.generate(VICTIMS[2], SamplingParams(**given))


@pytest.mark.parametrize("moment", [0, 1, 3])
def test_r39_an_exception_in_processing_is_one_requests(
    oracle: Oracle, moment: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    append = IncrementalDetokenizer.append
    seen = 0

    def failing(detokenizer: IncrementalDetokenizer, ids: Any) -> str:
        nonlocal seen
        if MARK in ids:
            seen += 1
            if seen == moment + 1:
                raise RuntimeError("secret detail")
        return append(detokenizer, ids)

    with oracle.victims():
        assert marked(oracle).outputs[0].token_ids == [MARK] * 6
        monkeypatch.setattr(IncrementalDetokenizer, "append", failing)
        output = marked(oracle)
        assert output.error is not None and output.error.code == "processing_error"
        assert "secret" not in output.error.message
        assert len(output.outputs[0].token_ids) == moment + 1


@pytest.mark.parametrize("where", ["forward", "logits", "sample"])
def test_r39_a_failing_step_fails_its_requests_and_no_other(
    oracle: Oracle, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All rows of the step share its fate; those that come later, and the engine, do not."""
    runner = oracle.llm.startup.engine.runner
    owner: Any = runner.sampler if where == "sample" else runner.model
    healthy = getattr(owner, where)
    is_armed = threading.Event()

    def failing(*args: Any, **kwargs: Any) -> Any:
        if is_armed.is_set():
            is_armed.clear()
            raise RuntimeError("secret detail")
        return healthy(*args, **kwargs)

    monkeypatch.setattr(owner, where, failing)
    running = [oracle.llm.generate_async(prompt, VICTIM_PARAMS, streaming=True) for prompt in VICTIMS]
    for generation in running:
        next(first_update(generation))
    is_armed.set()
    outputs = [generation.result(DEADLINE_S) for generation in running]
    for output, expected in zip(outputs, oracle.expected, strict=True):
        assert output.error is not None and output.outputs[0].finish_reason == "error"
        assert "secret" not in output.error.message
        ids = output.outputs[0].token_ids
        assert ids == expected[: len(ids)]
    again = oracle.llm.generate(VICTIMS, VICTIM_PARAMS)
    assert [output.outputs[0].token_ids for output in again] == oracle.expected
    oracle.check_rest()


class Poison:
    """Finds the row of a request in each step and spoils it once it has run `after` tokens there."""

    def __init__(self, runner: Runner, request_id: str, after: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.request_id = request_id
        self.after = after
        self.row = -1
        self.index = -1
        self.runner = runner
        self.num_spoiled = 0
        self._patch = monkeypatch
        self._launch = runner.launch
        monkeypatch.setattr(runner, "launch", self.launch)

    def launch(self, plan: StepPlan) -> Any:
        if self.row in plan.removed:
            self.row = -1
        for init in plan.added:
            if init.request_id == self.request_id:
                self.row = init.row
        rows = [span.row for span in plan.spans]
        self.span = rows.index(self.row) if self.row in rows else -1
        self.index = plan.sample.index(self.row) if self.row in plan.sample else -1
        if self.index >= 0:
            self.after -= 1
        return self._launch(plan)

    def spoil_logits(self) -> None:
        logits = self.runner.model.logits

        def poisoned(hidden_RD: torch.Tensor) -> torch.Tensor:
            logits_RV = logits(hidden_RD)
            if self.index >= 0 and self.after < 0:
                logits_RV[self.index] = float("nan")
                self.num_spoiled += 1
            return logits_RV

        self._patch.setattr(self.runner.model, "logits", poisoned)

    def spoil_cache(self) -> None:
        """Write NaN over the K and V of the row's own new tokens, as a broken kernel would."""
        forward = self.runner.model.forward

        def poisoned(batch: ForwardBatch) -> torch.Tensor:
            hidden_TD = forward(batch)
            if self.index >= 0 and self.after < 0:
                is_mine_T = batch.row_of_T == self.span
                for slots_T, pages in zip(batch.slot_mapping_T, batch.kv_pages, strict=True):
                    slots = slots_T[is_mine_T]
                    size = pages.shape[3]
                    pages[slots // size, :, :, slots % size] = float("nan")
                self.num_spoiled += 1
            return hidden_TD

        self._patch.setattr(self.runner.model, "forward", poisoned)


@pytest.mark.parametrize(
    ("what", "after", "is_overlap_off"),
    [("logits", 0, True), ("logits", 4, False), ("cache", 0, False), ("cache", 4, True)],
)
def test_r40_a_row_of_nan_fails_alone_and_leaves_clean_pages(
    folder: Path, what: str, after: int, is_overlap_off: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pool is so small that every page is used again by the requests that follow."""
    kv = KvCacheConfig(max_tokens=320, tokens_per_block=8)
    with LLM(folder, kv_cache_config=kv, disable_overlap_scheduler=is_overlap_off) as llm:
        oracle = Oracle(llm)
        runner = llm.startup.engine.runner
        assert isinstance(runner, Runner)
        with monkeypatch.context() as patch, oracle.victims():
            poison = Poison(runner, "bad", after, patch)
            poison.spoil_logits() if what == "logits" else poison.spoil_cache()
            bad = llm.generate_async(prompt_ids(30, seed=9), VICTIM_PARAMS, request_id="bad")
            output = bad.result(DEADLINE_S)
            assert poison.num_spoiled > 0
            assert output.error is not None and output.error.code == "numerical_error"
            assert "NaN" in output.error.message
            assert after <= len(output.outputs[0].token_ids) <= after + 1
        executed = llm.get_stats()["executed_tokens"]
        again = llm.generate([prompt_ids(30, seed=9), *VICTIMS] * 3, VICTIM_PARAMS, raise_on_error=True)
        assert llm.get_stats()["executed_tokens"] - executed > 320
        with LLM(folder) as healthy:
            expected = healthy.generate(prompt_ids(30, seed=9), VICTIM_PARAMS).outputs[0].token_ids
        for i, output in enumerate(again):
            assert output.outputs[0].token_ids == [expected, *oracle.expected][i % 5]
        # The null page, read by every masked position, never changed.
        assert (runner.pages[0] == 0).all()


def test_r41_a_request_with_every_token_masked_ends_cleanly(oracle: Oracle) -> None:
    """While min_tokens masks every stop id and every id is one, nothing is left to say."""
    with oracle.victims():
        params = SamplingParams(max_tokens=8, min_tokens=3, stop_token_ids=list(range(VOCAB)))
        output = oracle.llm.generate(VICTIMS[2], params)
        assert output.error is not None and "masked" in output.error.message
        assert output.outputs[0].token_ids == []


def test_r41_masks_of_a_step_reach_their_row_only(oracle: Oracle, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = oracle.llm.startup.engine.runner
    assert isinstance(runner, Runner)
    poison = Poison(runner, "dead end", 2, monkeypatch)
    sample = Sampler.sample

    def masked(sampler: Sampler, logits_RV: torch.Tensor, rows: Any, masks: Any = None, **more: Any) -> Any:
        if poison.index >= 0 and poison.after < 0:
            masks = torch.ones_like(logits_RV, dtype=torch.bool)
            masks[poison.index] = False
        return sample(sampler, logits_RV, rows, masks, **more)

    monkeypatch.setattr(Sampler, "sample", masked)
    with oracle.victims():
        bad = oracle.llm.generate_async(VICTIMS[2], VICTIM_PARAMS, request_id="dead end")
        output = bad.result(DEADLINE_S)
        assert output.error is not None and "masked" in output.error.message
        assert output.outputs[0].token_ids == oracle.expected[2][:2]


def test_r42_fifty_requests_finish_in_a_pool_of_little_more_than_one(folder: Path) -> None:
    prompts = [prompt_ids(8 + i % 17, seed=200 + i) for i in range(50)]
    params = SamplingParams(max_tokens=24, ignore_eos=True)
    with LLM(folder) as ample:
        expected = [output.outputs[0].token_ids for output in ample.generate(prompts, params)]
    # The longest request needs 48 tokens.
    kv = KvCacheConfig(max_tokens=56, tokens_per_block=8)
    with LLM(folder, kv_cache_config=kv, disable_overlap_scheduler=False) as llm:
        generations = [llm.generate_async(prompt, params) for prompt in prompts]
        outputs = [generation.result(DEADLINE_S) for generation in generations]
        stats = llm.get_stats()
        wait_idle(llm)
    assert [output.outputs[0].token_ids for output in outputs] == expected
    assert stats["num_preemptions"] > 0
    # No starvation: who came first is done first, but for those who run together.
    ends = [output.metrics.finished_s for output in outputs if output.metrics is not None]
    assert all(ends[i] < ends[i + 10] for i in range(40))  # type: ignore[operator]


def test_r44_churn_over_ten_pools_never_changes_an_answer(folder: Path) -> None:
    """Needles come back again and again while the hay between them evicts all or part of what they left."""
    needle_start = prompt_ids(40, seed=300)
    needles = [needle_start + prompt_ids(7, seed=301 + i) for i in range(3)]
    hay = [prompt_ids(20 + i % 40, seed=400 + i) for i in range(60)]
    order = [p for i, straw in enumerate(hay) for p in ([straw, needles[i % 3]] if i % 4 < 2 else [straw])]
    with LLM(folder, kv_cache_config=KvCacheConfig(enable_block_reuse=False)) as plain:
        expected = [output.outputs[0].token_ids for output in plain.generate(order, VICTIM_PARAMS)]
    kv = KvCacheConfig(max_tokens=256, tokens_per_block=8)
    with LLM(folder, kv_cache_config=kv, disable_overlap_scheduler=False, max_batch_size=4) as llm:
        outputs = llm.generate(order, VICTIM_PARAMS, raise_on_error=True)
        stats = llm.get_stats()
        wait_idle(llm)
    assert [output.outputs[0].token_ids for output in outputs] == expected
    assert stats["executed_tokens"] > 10 * 256
    cached = [out.num_cached_tokens for out, prompt in zip(outputs, order, strict=True) if prompt in needles]
    assert max(cached) >= 40 and stats["num_copied_blocks"] > 0


ALIKE = [
    ([12, 3] * 40, [1, 23] * 40),
    ([9, 5, 0, 6, 0] * 16, [5, 6] * 40),
    ([257, 1] * 40, [1, 257] * 40),
    ([256] * 80, [1] * 80),
]


def test_r45_alike_prompts_share_nothing(oracle: Oracle) -> None:
    """Digits, zeros, byte orders: whatever a sloppy key would run together."""
    with oracle.victims():
        for i, (first, second) in enumerate(ALIKE):
            params = SamplingParams(max_tokens=6, ignore_eos=True, cache_salt=f"pair-{i}")
            assert oracle.llm.generate(first, params).num_cached_tokens == 0
            cold = oracle.llm.generate(second, params)
            assert cold.num_cached_tokens == 0
            warm = oracle.llm.generate(second, params)
            assert warm.num_cached_tokens == len(second) - 1
            assert warm.outputs[0].token_ids == cold.outputs[0].token_ids


def test_r45_bad_salts_are_refused(oracle: Oracle) -> None:
    with oracle.victims():
        for salt in ("", "a b", "ключ", "x" * 257, "\ud800", 5, b"x", "\n"):
            oracle.refuses([5], param="cache_salt", cache_salt=salt)


def test_r45_salts_run_together_with_nothing(oracle: Oracle) -> None:
    prompt = prompt_ids(40, seed=500)
    with oracle.victims():
        for salt in ("ab", "a", "b", "ab0", None):
            params = SamplingParams(max_tokens=2, cache_salt=salt)
            assert oracle.llm.generate(prompt, params).num_cached_tokens == 0
