"""Does `LLM` do what its page promises? Prompts, streams, aborts, stops, seeds, life and death.

Tiny random twins throughout: what they generate is known from transformers, so every cut of it is checked
against the whole.
"""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from slipstream import LLM, RequestError, RequestOutput, SamplingParams
from slipstream.core.errors import ConfigError, EngineError
from slipstream.text.tokenizer import FastTokenizer
from tests.engine.tiny import (
    EOS,
    PAD,
    VOCAB,
    byte_tokenizer,
    one_thread,
    prompt_ids,
    tiny_llama,
    wait_idle,
    write_folder,
)
from tests.models.twins import make_llama

# Catches a hang only.
DEADLINE_S = 60.0
TEXT = "the cat sat on the mat"
LONG = SamplingParams(max_tokens=40, ignore_eos=True)


@pytest.fixture(scope="module", autouse=True)
def single_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def twin() -> Any:
    return tiny_llama()


@pytest.fixture(scope="module")
def folder(twin: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(twin, tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    with LLM(folder) as llm:
        yield llm


@pytest.fixture(scope="module")
def whole(llm: LLM) -> RequestOutput:
    """What the model says after TEXT, in full."""
    return llm.generate(TEXT, LONG, raise_on_error=True)


def test_every_form_of_a_prompt_means_the_same(llm: LLM, whole: RequestOutput) -> None:
    ids = llm.tokenizer.encode(TEXT)
    forms: list[Any] = [
        TEXT,
        ids,
        tuple(ids),
        {"prompt": TEXT},
        {"prompt_token_ids": ids},
        {"prompt": TEXT, "prompt_token_ids": ids},
    ]
    outputs = llm.generate(forms, LONG)
    assert [llm.generate(form, LONG).outputs[0].token_ids for form in forms] == [
        output.outputs[0].token_ids for output in outputs
    ]
    for form, output in zip(forms, outputs, strict=True):
        assert output.outputs[0].text == whole.outputs[0].text
        assert output.prompt_token_ids == ids
        has_text = isinstance(form, str) or (isinstance(form, dict) and "prompt" in form)
        assert output.prompt == (TEXT if has_text else None)
    assert len({output.request_id for output in outputs}) == len(forms)


def test_one_prompt_gives_one_output_and_a_list_gives_a_list(llm: LLM) -> None:
    params = SamplingParams(max_tokens=2)
    assert isinstance(llm.generate("ab", params), RequestOutput)
    assert isinstance(llm.generate([5, 6], params), RequestOutput)
    for prompts in (["ab"], [[5, 6]], [{"prompt": "ab"}]):
        assert [type(output) for output in llm.generate(prompts, params)] == [RequestOutput]
    mixed = llm.generate(["ab", [5, 6], {"prompt": "c"}], params)
    assert [len(output.prompt_token_ids) for output in mixed] == [len(llm.tokenizer.encode("ab")), 2, 1]


def test_defaults_are_greedy_and_32_tokens(llm: LLM, whole: RequestOutput) -> None:
    output = llm.generate(TEXT)
    assert output.outputs[0].token_ids == whole.outputs[0].token_ids[:32]
    assert output.outputs[0].finish_reason == "length" and output.outputs[0].stop_reason is None
    assert output.finished and output.error is None


def test_parameters_may_come_one_for_each(llm: LLM, whole: RequestOutput) -> None:
    params = [SamplingParams(max_tokens=n) for n in (3, 1, 7)]
    outputs = llm.generate([TEXT] * 3, params)
    expected = [whole.outputs[0].token_ids[:n] for n in (3, 1, 7)]
    assert [output.outputs[0].token_ids for output in outputs] == expected
    with pytest.raises(RequestError, match="3 sampling_params for 2 prompts"):
        llm.generate([TEXT] * 2, params)


def test_one_bad_prompt_never_loses_the_others(llm: LLM, whole: RequestOutput) -> None:
    outputs = llm.generate([TEXT, "", [VOCAB], TEXT], LONG)
    assert [output.error is None for output in outputs] == [True, False, False, True]
    assert outputs[3].outputs[0].text == whole.outputs[0].text
    bad = outputs[2]
    assert isinstance(bad.error, RequestError) and str(VOCAB) in bad.error.message
    assert bad.finished and bad.outputs[0].finish_reason == "error"
    with pytest.raises(RequestError, match="empty"):
        llm.generate([TEXT, ""], LONG, raise_on_error=True)
    wait_idle(llm)


def test_chat_renders_the_models_template(llm: LLM) -> None:
    chats = [[{"role": "user", "content": "hi"}], [{"role": "user", "content": "you </s> there"}]]
    outputs = llm.chat(chats, SamplingParams(max_tokens=4))
    assert [output.prompt for output in outputs] == [
        "<s>user: hi<end_of_turn>model: ",
        "<s>user: you </s> there<end_of_turn>model: ",
    ]
    assert outputs[0].prompt_token_ids == llm.tokenizer.encode(outputs[0].prompt, add_special_tokens=False)
    # A user's spelling of a control token stays text.
    assert EOS not in outputs[1].prompt_token_ids
    one = llm.chat(chats[0], SamplingParams(max_tokens=4))
    assert one.outputs[0].token_ids == outputs[0].outputs[0].token_ids
    streamed = list(llm.chat_async(chats[0], SamplingParams(max_tokens=4), streaming=True))
    assert streamed[-1].outputs[0].token_ids == one.outputs[0].token_ids


def check_stream(outputs: list[RequestOutput], expected: RequestOutput) -> None:
    final = outputs[-1].outputs[0]
    assert "".join(output.outputs[0].text_diff for output in outputs) == final.text
    assert [t for output in outputs for t in output.outputs[0].token_ids_diff] == final.token_ids
    assert (final.text, final.token_ids) == (expected.outputs[0].text, expected.outputs[0].token_ids)
    assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]


@pytest.mark.parametrize("interval", [1, 7])
def test_a_stream_adds_up_to_the_whole(folder: Path, whole: RequestOutput, interval: int) -> None:
    with LLM(folder, stream_interval=interval) as llm:
        outputs = list(llm.generate_async(TEXT, LONG, streaming=True))
    check_stream(outputs, whole)
    # One update a token at most; the text of the last ones may come with the end.
    assert len(outputs) >= 40 // interval


def test_without_streaming_there_is_one_output(llm: LLM, whole: RequestOutput) -> None:
    outputs = list(llm.generate_async(TEXT, LONG))
    assert len(outputs) == 1
    check_stream(outputs, whole)


def test_async_for_await_and_result(llm: LLM, whole: RequestOutput) -> None:
    async def read() -> list[RequestOutput]:
        other = llm.generate_async([9, 8, 7], LONG)
        outputs = [output async for output in llm.generate_async(TEXT, LONG, streaming=True)]
        assert (await other).finished
        both = await asyncio.gather(llm.generate_async(TEXT, LONG), llm.generate_async(TEXT, LONG).aresult())
        assert {output.outputs[0].text for output in both} == {whole.outputs[0].text}
        return outputs

    check_stream(asyncio.run(asyncio.wait_for(read(), DEADLINE_S)), whole)
    assert llm.generate_async(TEXT, LONG).result(DEADLINE_S).outputs[0].text == whole.outputs[0].text


def test_result_times_out_and_the_request_goes_on(llm: LLM) -> None:
    generation = llm.generate_async([5] * 20, SamplingParams(max_tokens=300, ignore_eos=True))
    with pytest.raises(TimeoutError, match="did not finish"):
        generation.result(timeout=0.0)
    assert len(generation.result(DEADLINE_S).outputs[0].token_ids) == 300


def test_refusals_are_raised_at_once(llm: LLM) -> None:
    for prompt in ("", [VOCAB], {"prompts": "x"}, 7):
        with pytest.raises(RequestError):
            llm.generate_async(prompt)  # type: ignore[arg-type]


def test_a_request_id_is_kept_and_unique_while_it_runs(llm: LLM) -> None:
    first = llm.generate_async([5] * 20, SamplingParams(max_tokens=300, ignore_eos=True), request_id="mine")
    with pytest.raises(RequestError, match="'mine' is in use"):
        llm.generate_async("x", request_id="mine")
    first.abort()
    assert first.result(DEADLINE_S).request_id == "mine"
    wait_idle(llm)
    assert llm.generate_async("x", request_id="mine").result(DEADLINE_S).error is None


@pytest.mark.parametrize("is_overlap_off", [True, False])
def test_an_abort_at_any_moment_frees_everything(folder: Path, is_overlap_off: bool) -> None:
    prompt = prompt_ids(90, seed=3)
    with LLM(folder, disable_overlap_scheduler=is_overlap_off, max_num_tokens=32, max_batch_size=8) as llm:
        expected = llm.generate(prompt, LONG).outputs[0].token_ids
        for moment in range(14):
            generation = llm.generate_async(prompt, LONG, streaming=True)
            updates = [update for update, _ in zip(generation, range(moment), strict=False)]
            assert len(updates) == moment
            generation.abort()
            output = generation.result(DEADLINE_S)
            assert output.outputs[0].finish_reason == "cancelled"
            ids = output.outputs[0].token_ids
            assert moment <= len(ids) < 40 and ids == expected[: len(ids)]
            wait_idle(llm)
            generation.abort()  # idempotent, also after the end
        assert llm.generate(prompt, LONG).outputs[0].token_ids == expected


def test_leaving_a_loop_early_aborts(llm: LLM) -> None:
    for _ in llm.generate_async([5] * 9, SamplingParams(max_tokens=400, ignore_eos=True), streaming=True):
        break
    wait_idle(llm)

    async def read() -> None:
        generation = llm.generate_async([5] * 9, SamplingParams(max_tokens=400), streaming=True)
        task = asyncio.ensure_future(generation.aresult())
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    before = llm.get_stats()["executed_tokens"]
    asyncio.run(asyncio.wait_for(read(), DEADLINE_S))
    wait_idle(llm)
    assert llm.get_stats()["executed_tokens"] - before < 400


def earliest(text: str, stops: list[str]) -> tuple[int, str]:
    """Return where the stop that is complete first begins; of those ending together, the longest."""
    ends = [(text.index(stop) + len(stop), -len(stop), stop) for stop in stops if stop in text]
    end, _, stop = min(ends)
    return end - len(stop), stop


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("streaming", [False, True])
def test_stop_strings_wherever_they_lie(
    llm: LLM, whole: RequestOutput, include: bool, streaming: bool
) -> None:
    text = whole.outputs[0].text
    tokens = [llm.tokenizer.decode([token]) for token in whole.outputs[0].token_ids]
    borders = {len("".join(tokens[:i])) for i in range(len(tokens))}
    crossed = 0
    generations = []
    for start in range(2, len(text) - 4, 3):
        stops = [text[start : start + 4], text[start + 2 : start + 4], "\x00never"]
        params = SamplingParams(max_tokens=40, stop=stops, include_stop_str_in_output=include)
        generations.append((stops, llm.generate_async(TEXT, params, streaming=streaming)))
    for stops, generation in generations:
        outputs = list(generation)
        place, stop = earliest(text, stops)
        crossed += any(place < border < place + len(stop) for border in borders)
        output = outputs[-1].outputs[0]
        assert output.text == text[: place + (len(stop) if include else 0)]
        assert (output.finish_reason, output.stop_reason) == ("stop", stop)
        assert output.token_ids == whole.outputs[0].token_ids[: len(output.token_ids)]
        assert all(text.startswith(update.outputs[0].text) for update in outputs)
        assert "".join(update.outputs[0].text_diff for update in outputs) == output.text
    assert crossed >= 5
    wait_idle(llm)


def test_stop_strings_end_each_sample_by_itself(llm: LLM) -> None:
    def params(**more: Any) -> SamplingParams:
        return SamplingParams(
            max_tokens=30, n=4, temperature=1.0, repetition_penalty=1.3, seed=5, ignore_eos=True, **more
        )

    samples = llm.generate(TEXT, params()).outputs
    assert len({sample.text for sample in samples}) == 4
    stops = [samples[0].text[10:13], samples[2].text[5:8], "\x00never"]
    stopped = llm.generate(TEXT, params(stop=stops)).outputs
    for free, cut in zip(samples, stopped, strict=True):
        if any(stop in free.text for stop in stops):
            place, stop = earliest(free.text, stops)
            assert (cut.text, cut.finish_reason, cut.stop_reason) == (free.text[:place], "stop", stop)
        else:
            assert (cut.text, cut.finish_reason) == (free.text, "length")
    assert stopped[0].finish_reason == stopped[2].finish_reason == "stop"
    wait_idle(llm)


def test_stop_token_ids_end_at_the_first_of_them(llm: LLM, whole: RequestOutput) -> None:
    ids = whole.outputs[0].token_ids
    first = next(i for i in range(5, 40) if ids[i] not in ids[:i])
    later = next(i for i in range(first + 1, 40) if ids[i] not in ids[:i])
    stops = [ids[later], ids[first]]
    for include in (False, True):
        params = SamplingParams(max_tokens=40, stop_token_ids=stops, include_stop_str_in_output=include)
        output = llm.generate(TEXT, params).outputs[0]
        assert output.token_ids == ids[: first + 1]
        assert (output.finish_reason, output.stop_reason) == ("stop", ids[first])
        assert output.text == llm.tokenizer.decode(ids[: first + include])


@pytest.fixture(scope="module")
def ends(whole: RequestOutput) -> tuple[int, int]:
    """Two tokens that the model comes to say after TEXT, the later one listed first."""
    ids = whole.outputs[0].token_ids
    first = next(i for i in range(6, 40) if ids[i] not in ids[:i])
    later = next(i for i in range(first + 2, 40) if ids[i] not in ids[:i])
    return ids[later], ids[first]


@pytest.fixture(scope="module")
def ending_llm(twin: Any, ends: tuple[int, int], tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    """The same model, published with these two tokens as its ends."""
    with LLM(write_folder(twin, tmp_path_factory.mktemp("ends"), eos_token_ids=ends)) as llm:
        yield llm


def test_any_of_several_eos_ids_ends(ending_llm: LLM, ends: tuple[int, int], whole: RequestOutput) -> None:
    ids = whole.outputs[0].token_ids
    output = ending_llm.generate(TEXT, SamplingParams(max_tokens=40)).outputs[0]
    assert output.token_ids == ids[: ids.index(ends[1]) + 1]
    assert (output.finish_reason, output.stop_reason) == ("stop", ends[1])
    # The later one ends it too, where the first cannot come.
    params = SamplingParams(max_tokens=40, logit_bias={ends[1]: -100.0})
    assert ending_llm.generate(TEXT, params).outputs[0].token_ids[-1] != ends[1]
    output = ending_llm.generate([*ending_llm.tokenizer.encode(TEXT), *ids[: ids.index(ends[0])]])
    assert output.outputs[0].token_ids == [ends[0]]


def test_ignore_eos_goes_on(ending_llm: LLM, whole: RequestOutput) -> None:
    assert ending_llm.generate(TEXT, LONG).outputs[0].token_ids == whole.outputs[0].token_ids


@pytest.mark.parametrize("min_tokens", [1, 12, 40])
def test_min_tokens_keeps_ends_away_as_transformers_does(
    ending_llm: LLM, twin: Any, ends: tuple[int, int], min_tokens: int
) -> None:
    ids = torch.tensor([ending_llm.tokenizer.encode(TEXT)])
    expected = twin.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=40,
        min_new_tokens=min_tokens,
        eos_token_id=list(ends),
        pad_token_id=PAD,
    )[0, ids.shape[1] :].tolist()
    output = ending_llm.generate(TEXT, SamplingParams(max_tokens=40, min_tokens=min_tokens)).outputs[0]
    assert output.token_ids == expected and len(expected) >= min_tokens
    assert not set(ends) & set(expected[: min_tokens - 1])


def test_without_detokenizing_there_are_only_ids(llm: LLM, whole: RequestOutput) -> None:
    params = SamplingParams(max_tokens=40, ignore_eos=True, detokenize=False)
    output = llm.generate(TEXT, params).outputs[0]
    assert (output.text, output.token_ids) == ("", whole.outputs[0].token_ids)


def test_special_tokens_are_shown_when_asked_for(llm: LLM) -> None:
    for skip, text in ((True, ""), (False, "<end_of_turn>" * 3)):
        params = SamplingParams(
            max_tokens=3, ignore_eos=True, skip_special_tokens=skip, logit_bias={3: 100.0}
        )
        output = llm.generate("x", params).outputs[0]
        if output.token_ids == [3, 3, 3]:
            assert output.text == text
        else:
            pytest.fail(f"the bias did not outweigh the model: {output.token_ids}")


def test_logprobs_are_the_raw_log_softmax(whole: RequestOutput, tmp_path: Path) -> None:
    """Before temperature, penalties and bias; ranks count from 1. The twin's logits are of usual size."""
    twin = make_llama(vocab_size=VOCAB)
    params = SamplingParams(
        max_tokens=20, logprobs=3, temperature=0.7, repetition_penalty=1.3, seed=2, ignore_eos=True
    )
    with LLM(write_folder(twin, tmp_path)) as llm:
        output = llm.generate(TEXT, params).outputs[0]
    prompt = byte_tokenizer().encode(TEXT).ids
    with torch.no_grad():
        logits = twin(torch.tensor([[*prompt, *output.token_ids]])).logits[0]
    expected = logits.float().log_softmax(-1)[len(prompt) - 1 : -1]
    assert output.logprobs is not None and len(output.logprobs) == 20
    for token, entry, line in zip(output.token_ids, output.logprobs, expected, strict=True):
        top = line.topk(3).indices.tolist()
        assert set(entry) == {token, *top}
        for shown, logprob in entry.items():
            # Logits of some units summed in float32 in another order: errors of a few 1e-6.
            assert logprob.logprob == pytest.approx(float(line[shown]), abs=1e-4)
            assert logprob.rank == int((line > line[shown]).sum()) + 1
            assert logprob.decoded_token == llm.tokenizer.token_text(shown)
    total = sum(entry[token].logprob for token, entry in zip(output.token_ids, output.logprobs, strict=True))
    assert output.cumulative_logprob == pytest.approx(total)
    assert whole.outputs[0].logprobs is None and whole.outputs[0].cumulative_logprob is None


RANDOM = {"max_tokens": 24, "temperature": 1.0, "repetition_penalty": 1.3, "ignore_eos": True}


def test_seeds_repeat_and_their_absence_does_not(llm: LLM) -> None:
    def run(**more: Any) -> list[int]:
        return llm.generate(TEXT, SamplingParams(**RANDOM, **more)).outputs[0].token_ids

    assert run(seed=1) == run(seed=1) != run(seed=2)
    # The twin is sure of most tokens, so two runs may agree by chance; eight do not.
    assert len({tuple(run()) for _ in range(8)}) > 1


def test_a_seed_of_the_llm_seeds_what_brings_none(folder: Path) -> None:
    def run(seed: int | None) -> list[list[int]]:
        with LLM(folder, seed=seed) as llm:
            outputs = llm.generate([TEXT] * 3, SamplingParams(**RANDOM))
            return [output.outputs[0].token_ids for output in outputs]

    first = run(3)
    assert first == run(3) != run(4)
    assert len({tuple(ids) for ids in first}) == 3
    assert run(None) != run(None)


def test_an_equal_prompt_is_computed_once_per_salt(llm: LLM) -> None:
    prompt = prompt_ids(70, seed=8)

    def run(salt: str | None) -> tuple[int, int, list[int]]:
        before = llm.get_stats()["executed_tokens"]
        output = llm.generate(prompt, SamplingParams(max_tokens=4, ignore_eos=True, cache_salt=salt))
        executed = llm.get_stats()["executed_tokens"] - before
        return output.num_cached_tokens, executed, output.outputs[0].token_ids

    cold = run(None)
    assert cold[:2] == (0, 70 + 3)
    assert run(None) == (69, 1 + 3, cold[2])
    assert run("tenant-a") == (0, 70 + 3, cold[2])
    assert run("tenant-b")[:1] == (0,) and run("tenant-a")[:2] == (69, 1 + 3)


def test_a_tokenizer_object_is_used_as_it_is(folder: Path, whole: RequestOutput) -> None:
    tokenizer = FastTokenizer(byte_tokenizer())
    with LLM(folder, tokenizer=tokenizer) as llm:
        assert llm.tokenizer is tokenizer
        assert llm.generate(TEXT, LONG).outputs[0].text == whole.outputs[0].text
        output = llm.chat([{"role": "user", "content": "hi"}])
        assert output.error is not None and "no chat template" in output.error.message


def test_a_tokenizer_from_another_folder(folder: Path, whole: RequestOutput, tmp_path: Path) -> None:
    byte_tokenizer().save(str(tmp_path / "tokenizer.json"))
    with LLM(folder, tokenizer=tmp_path) as llm:
        assert llm.generate(TEXT, LONG).outputs[0].text == whole.outputs[0].text


def test_without_a_tokenizer_ids_go_in_and_out(folder: Path, whole: RequestOutput) -> None:
    with LLM(folder, skip_tokenizer_init=True) as llm:
        output = llm.generate(whole.prompt_token_ids, LONG)
        assert output.outputs[0].token_ids == whole.outputs[0].token_ids
        assert output.outputs[0].text == ""
        with pytest.raises(ConfigError, match="skip_tokenizer_init"):
            _ = llm.tokenizer
        refused = llm.generate(whole.prompt_token_ids, SamplingParams(stop="x"))
        assert refused.error is not None and "stop_token_ids" in refused.error.message
        texts = llm.generate([TEXT, whole.prompt_token_ids], LONG)
        assert texts[0].error is not None and "skip_tokenizer_init" in texts[0].error.message
        assert texts[1].error is None
        chat = llm.chat([{"role": "user", "content": "hi"}])
        assert chat.error is not None and chat.error.code == "unsupported"
        # The end of text still comes from the checkpoint.
        assert EOS in llm.startup.limits.eos_token_ids


def engine_threads() -> set[int]:
    return {t.ident or 0 for t in threading.enumerate() if t.name.startswith("slipstream")}


def eventually(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not holds():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.01)


def test_shutdown_ends_everything_and_may_be_called_again(folder: Path) -> None:
    before = engine_threads()
    with LLM(folder) as llm:
        running = llm.generate_async([5] * 9, SamplingParams(max_tokens=500, ignore_eos=True))
        assert len(engine_threads() - before) == 1
    assert engine_threads() == before
    error = running.result(DEADLINE_S).error
    assert error is not None and error.code == "engine_stopped"
    llm.shutdown()
    with pytest.raises(EngineError, match="shut down"):
        llm.generate(TEXT)
    with pytest.raises(EngineError, match="shut down"):
        llm.generate_async(TEXT)
    running.abort()


def test_an_exception_inside_the_block_shuts_down_too(folder: Path) -> None:
    before = engine_threads()

    def fail() -> None:
        with LLM(folder):
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert engine_threads() == before


def test_a_deleted_llm_stops_its_thread_and_frees_its_weights(folder: Path) -> None:
    before = engine_threads()
    llm = LLM(folder)
    llm.generate("x", SamplingParams(max_tokens=2))
    running = llm.generate_async([5] * 9, SamplingParams(max_tokens=500, ignore_eos=True))
    alive = weakref.ref(llm)
    weights = weakref.ref(llm.startup.engine.runner.model)
    del llm
    gc.collect()
    assert alive() is None
    eventually(lambda: engine_threads() == before)
    error = running.result(DEADLINE_S).error
    assert error is not None and error.code == "engine_stopped"
    del running, error
    gc.collect()
    assert weights() is None


def test_two_llms_live_beside_each_other(folder: Path, whole: RequestOutput, tmp_path: Path) -> None:
    other_folder = write_folder(tiny_llama(seed=9), tmp_path / "other")
    with LLM(other_folder) as other:
        alone = other.generate(TEXT, LONG).outputs[0].text
        with LLM(folder) as llm:
            assert llm.llm_id != other.llm_id
            pairs = [(llm.generate_async(TEXT, LONG), other.generate_async(TEXT, LONG)) for _ in range(4)]
            for mine, others in pairs:
                assert mine.result(DEADLINE_S).outputs[0].text == whole.outputs[0].text
                assert others.result(DEADLINE_S).outputs[0].text == alone
        assert other.generate(TEXT, LONG).outputs[0].text == alone != whole.outputs[0].text


def test_many_threads_may_generate(llm: LLM, whole: RequestOutput) -> None:
    texts: list[str] = []
    threads = [
        threading.Thread(target=lambda: texts.append(llm.generate(TEXT, LONG).outputs[0].text))
        for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
    assert texts == [whole.outputs[0].text] * 6
    wait_idle(llm)
