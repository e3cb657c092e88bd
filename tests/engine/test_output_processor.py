"""Do events become the outputs a user was promised? Text, stops, samples, diffs, and failures of one request.

Invariant tested throughout: whatever the engine computes past a stop, no output ever shows it.
"""

from __future__ import annotations

from typing import Any

import pytest

from slipstream.core.errors import RequestError
from slipstream.core.limits import Limits
from slipstream.core.outputs import RequestOutput, TokenEvent
from slipstream.core.plan import TokenLogprobs
from slipstream.core.request import Request
from slipstream.core.sampling_params import SamplingParams
from slipstream.engine.output_processor import OutputProcessor
from slipstream.text.detokenizer import IncrementalDetokenizer
from slipstream.text.tokenizer import FastTokenizer
from tests.engine.tiny import EOS, VOCAB, byte_tokenizer

LIMITS = Limits(vocab_size=VOCAB, max_seq_len=1000, eos_token_ids=(EOS,))


@pytest.fixture(scope="module")
def tokenizer() -> FastTokenizer:
    return FastTokenizer(
        byte_tokenizer(), special_tokens={"bos_token": "<s>", "eos_token": "</s>"}, eos_token_ids=[EOS]
    )


class Desk:
    """A processor, one request "r" in it, and every output it delivered."""

    def __init__(
        self, tokenizer: FastTokenizer | None, *, streams: Any = True, interval: int = 1, **params: Any
    ) -> None:
        self.processor = OutputProcessor(tokenizer, stream_interval=interval)
        self.outputs: list[RequestOutput] = []
        self.ids = tokenizer.encode if tokenizer is not None else None
        request = Request.create([5, 6], SamplingParams(**params), LIMITS, request_id="r", prompt="ab")
        self.processor.add(request, self.outputs.append, streams=streams)

    def feed(self, text: str, index: int = 0) -> list[tuple[str, int]]:
        """Send a text one token an event; returns what the processor wants aborted."""
        assert self.ids is not None
        aborts = []
        for token in self.ids(text):
            aborts += self.processor.process([TokenEvent("r", index, [token])])
        return aborts

    def end(self, reason: Any = "length", index: int = 0, **fields: Any) -> list[tuple[str, int]]:
        return self.processor.process([TokenEvent("r", index, finish_reason=reason, **fields)])

    @property
    def last(self) -> RequestOutput:
        return self.outputs[-1]


def check_stream(outputs: list[RequestOutput]) -> None:
    """Assert that the diffs add up, that nothing is taken back, and that the end comes once."""
    final = outputs[-1]
    assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
    for index, sample in enumerate(final.outputs):
        assert "".join(output.outputs[index].text_diff for output in outputs) == sample.text
        ids = [token for output in outputs for token in output.outputs[index].token_ids_diff]
        assert ids == sample.token_ids
        for output in outputs:
            assert sample.text.startswith(output.outputs[index].text)


def test_a_stream_adds_up(tokenizer: FastTokenizer) -> None:
    desk = Desk(tokenizer)
    desk.feed("Grüße 🙂 from here")
    desk.end(num_cached_tokens=1)
    check_stream(desk.outputs)
    assert desk.last.outputs[0].text == "Grüße 🙂 from here"
    assert all("\ufffd" not in output.outputs[0].text for output in desk.outputs)
    assert desk.last.outputs[0].finish_reason == "length"
    assert desk.last.num_cached_tokens == 1
    assert (desk.last.prompt, desk.last.prompt_token_ids) == ("ab", [5, 6])
    metrics = desk.last.metrics
    assert metrics is not None and metrics.ttft_s is not None and metrics.finished_s is not None
    assert metrics.arrival_s <= metrics.first_token_s <= metrics.finished_s  # type: ignore[operator]


def test_without_streaming_only_the_end_is_delivered(tokenizer: FastTokenizer) -> None:
    desk = Desk(tokenizer, streams=False)
    desk.feed("quiet")
    assert not desk.outputs
    desk.end()
    assert [output.outputs[0].text_diff for output in desk.outputs] == ["quiet"]


def test_an_interval_bundles_tokens(tokenizer: FastTokenizer) -> None:
    desk = Desk(tokenizer, interval=4)
    desk.feed("0123456789")
    desk.end()
    assert [len(output.outputs[0].token_ids_diff) for output in desk.outputs] == [4, 4, 2]
    check_stream(desk.outputs)


def test_a_snapshot_does_not_change_later(tokenizer: FastTokenizer) -> None:
    desk = Desk(tokenizer, logprobs=0)
    for token in (70, 71):
        logprobs = [TokenLogprobs(token, -0.5, 1, [])]
        desk.processor.process([TokenEvent("r", 0, [token], logprobs)])
    first, second = (output.outputs[0] for output in desk.outputs)
    assert (first.token_ids, second.token_ids) == ([70], [70, 71])
    assert first.logprobs is not None and len(first.logprobs) == 1
    assert (first.cumulative_logprob, second.cumulative_logprob) == (-0.5, -1.0)


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("stop", ["zQy", "Qyx", "Q", "cQyx7"])
def test_a_stop_string_over_token_borders_ends_text_and_ids(
    tokenizer: FastTokenizer, stop: str, include: bool
) -> None:
    """Tokens and an end that the engine sends later, in the same batch of events or not, are dropped."""
    before = "false zQ and " + {"zQy": "", "Qyx": "z", "Q": "z", "cQyx7": "ab"}[stop]
    if stop == "Q":
        before = "no such letter "
    desk = Desk(tokenizer, stop=[stop, "never"], include_stop_str_in_output=include)
    aborts = desk.feed(before + stop + "lag")
    assert aborts == [("r", 0)]
    assert desk.processor.process([TokenEvent("r", 0, [9])]) == [] and desk.end("cancelled") == []
    check_stream(desk.outputs)
    output = desk.last.outputs[0]
    assert output.text == before + (stop if include else "")
    assert (output.finish_reason, output.stop_reason) == ("stop", stop)
    assert tokenizer.decode(output.token_ids).endswith(stop)
    assert desk.processor.num_pending == 0


def test_a_false_start_of_a_stop_is_held_and_then_released(tokenizer: FastTokenizer) -> None:
    desk = Desk(tokenizer, stop="QQQ")
    desk.feed("kQQ")
    assert desk.last.outputs[0].text == "k"
    desk.feed("w")
    assert desk.last.outputs[0].text == "kQQw"
    desk.feed("QQ")
    desk.end("length")
    assert desk.last.outputs[0].text == "kQQwQQ"
    assert desk.last.outputs[0].finish_reason == "length"
    check_stream(desk.outputs)


def test_several_tokens_in_one_event_stop_inside_it(tokenizer: FastTokenizer) -> None:
    desk = Desk(tokenizer, stop="Q")
    ids = tokenizer.encode("xyQzz")
    assert desk.processor.process([TokenEvent("r", 0, ids, finish_reason="length")]) == []
    output = desk.last.outputs[0]
    assert (output.text, output.finish_reason) == ("xy", "stop")
    assert output.token_ids == ids[:3]


def test_a_stop_string_completed_by_the_last_flush(tokenizer: FastTokenizer) -> None:
    """Half a character becomes U+FFFD at the end, and that may be what a stop waits for."""
    desk = Desk(tokenizer, stop="\ufffd")
    half = tokenizer.encode("é")[0]
    desk.processor.process([TokenEvent("r", 0, [half], finish_reason="length")])
    output = desk.last.outputs[0]
    assert (output.text, output.finish_reason, output.stop_reason) == ("", "stop", "\ufffd")


@pytest.mark.parametrize("include", [False, True])
def test_the_stop_token_is_among_the_ids_and_hidden_in_the_text(
    tokenizer: FastTokenizer, include: bool
) -> None:
    desk = Desk(tokenizer, include_stop_str_in_output=include)
    stop = tokenizer.encode("Z")[0]
    desk.feed("ab")
    desk.processor.process([TokenEvent("r", 0, [stop], finish_reason="stop", stop_reason=stop)])
    output = desk.last.outputs[0]
    assert output.text == ("abZ" if include else "ab")
    assert output.token_ids[-1] == stop
    assert (output.finish_reason, output.stop_reason) == ("stop", stop)
    check_stream(desk.outputs)


def test_special_tokens_show_only_when_asked_for(tokenizer: FastTokenizer) -> None:
    for skip, text in ((True, "ab"), (False, "a<s>b")):
        desk = Desk(tokenizer, skip_special_tokens=skip)
        desk.processor.process([TokenEvent("r", 0, tokenizer.encode("a<s>b"), finish_reason="length")])
        assert desk.last.outputs[0].text == text


@pytest.mark.parametrize("has_tokenizer", [True, False])
def test_without_detokenizing_there_is_no_text(tokenizer: FastTokenizer, has_tokenizer: bool) -> None:
    desk = Desk(tokenizer, detokenize=False) if has_tokenizer else Desk(None, logprobs=0)
    logprobs = [] if has_tokenizer else [TokenLogprobs(70, -1.0, 3, [])]
    desk.processor.process([TokenEvent("r", 0, [70], logprobs, finish_reason="length")])
    output = desk.last.outputs[0]
    assert (output.text, output.token_ids) == ("", [70])
    if not has_tokenizer:
        assert output.logprobs is not None and output.logprobs[0][70].decoded_token is None


def test_logprobs_hold_the_sampled_token_and_the_leading_ones(tokenizer: FastTokenizer) -> None:
    desk = Desk(tokenizer, logprobs=2)
    token, best, second = (tokenizer.encode(text)[0] for text in "xyz")
    logprobs = TokenLogprobs(token, -3.0, 7, [(best, -0.1), (second, -2.5)])
    desk.processor.process([TokenEvent("r", 0, [token], [logprobs], finish_reason="length")])
    output = desk.last.outputs[0]
    assert output.logprobs is not None
    shown = {t: (lp.logprob, lp.rank, lp.decoded_token) for t, lp in output.logprobs[0].items()}
    assert shown == {best: (-0.1, 1, "y"), second: (-2.5, 2, "z"), token: (-3.0, 7, "x")}
    assert output.cumulative_logprob == -3.0


def test_samples_grow_and_end_apart(tokenizer: FastTokenizer) -> None:
    desk = Desk(tokenizer, n=3, stop="Q")
    assert desk.feed("one Q more", index=1) == [("r", 1)]
    assert desk.feed("two", index=2) == []
    desk.end("length", index=2)
    assert not desk.last.finished
    assert desk.feed("zero Q", index=0) == [("r", 0)]
    check_stream(desk.outputs)
    assert [sample.text for sample in desk.last.outputs] == ["zero ", "one ", "two"]
    assert [sample.finish_reason for sample in desk.last.outputs] == ["stop", "stop", "length"]


def test_a_failure_while_processing_is_that_requests_alone(
    tokenizer: FastTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = Desk(tokenizer)
    mates: list[RequestOutput] = []
    mate = Request.create([5], SamplingParams(), LIMITS, request_id="mate")
    desk.processor.add(mate, mates.append)
    append = IncrementalDetokenizer.append

    def failing(detokenizer: IncrementalDetokenizer, ids: tuple[int, ...]) -> str:
        if ids == (99,):
            raise RuntimeError("secret detail")
        return append(detokenizer, ids)

    monkeypatch.setattr(IncrementalDetokenizer, "append", failing)
    events = [TokenEvent("r", 0, [99]), TokenEvent("mate", 0, tokenizer.encode("x"), finish_reason="length")]
    assert desk.processor.process(events) == [("r", 0)]
    assert desk.last.finished and desk.last.outputs[0].finish_reason == "error"
    error = desk.last.error
    assert error is not None and error.code == "processing_error" and "secret" not in error.message
    assert mates[0].error is None and mates[0].outputs[0].text == "x"
    assert desk.processor.num_pending == 0


def test_a_failing_listener_harms_nobody_else(tokenizer: FastTokenizer) -> None:
    """A listener is a caller's code; what it raises must not end the engine's thread."""
    desk = Desk(tokenizer)

    def raise_always(output: RequestOutput) -> None:
        raise RuntimeError("a listener")

    bad = Request.create([5], SamplingParams(), LIMITS, request_id="bad")
    desk.processor.add(bad, raise_always, streams=True)
    events = [TokenEvent("bad", 0, [70]), TokenEvent("r", 0, [70], finish_reason="length")]
    assert desk.processor.process(events) == [("bad", 0)]
    assert desk.last.finished
    assert desk.processor.num_pending == 0


def test_an_error_event_ends_the_request_with_its_code(tokenizer: FastTokenizer) -> None:
    desk = Desk(tokenizer)
    desk.feed("partial")
    desk.end("error", error=("NaN in the logits", "numerical_error"))
    assert isinstance(desk.last.error, RequestError)
    assert (desk.last.error.message, desk.last.error.code) == ("NaN in the logits", "numerical_error")
    assert desk.last.outputs[0].text == "partial"


def test_an_id_in_use_is_refused_until_it_ends(tokenizer: FastTokenizer) -> None:
    desk = Desk(tokenizer)
    again = Request.create([5], SamplingParams(), LIMITS, request_id="r")
    with pytest.raises(RequestError, match="'r' is in use"):
        desk.processor.add(again, desk.outputs.append)
    desk.end()
    desk.processor.add(again, desk.outputs.append)


def test_a_stopped_engine_ends_what_is_pending(tokenizer: FastTokenizer) -> None:
    desk = Desk(tokenizer, n=2)
    desk.feed("half", index=1)
    desk.end("length", index=1)
    desk.processor.fail_all("it broke")
    assert desk.last.finished and desk.processor.num_pending == 0
    assert [sample.finish_reason for sample in desk.last.outputs] == ["error", "length"]
    assert desk.last.error is not None and desk.last.error.code == "engine_stopped"
    assert desk.processor.process([TokenEvent("r", 0, [70])]) == []


def test_events_of_unknown_requests_are_ignored(tokenizer: FastTokenizer) -> None:
    desk = Desk(tokenizer)
    assert desk.processor.process([TokenEvent("nobody", 0, [70], finish_reason="stop")]) == []
    assert not desk.outputs


def ranked_desk(tokenizer: FastTokenizer, **params: Any) -> Desk:
    """Three samples of which two are shown; their likelihoods are -3, -1 and -2."""
    desk = Desk(tokenizer, n=2, best_of=3, max_tokens=1, **params)
    for index, logprob in enumerate((-3.0, -1.0, -2.0)):
        entry = TokenLogprobs(token_id=70 + index, logprob=logprob, rank=1, top=[])
        event = TokenEvent("r", index, [70 + index], logprobs=[entry], finish_reason="length")
        desk.processor.process([event])
    return desk


def test_the_likeliest_samples_come_first_and_the_others_not_at_all(tokenizer: FastTokenizer) -> None:
    desk = ranked_desk(tokenizer)
    assert len(desk.outputs) == 1, "nothing is shown that may be left out later"
    assert [sample.token_ids for sample in desk.last.outputs] == [[71], [72]]
    assert [sample.index for sample in desk.last.outputs] == [0, 1]
    assert [sample.cumulative_logprob for sample in desk.last.outputs] == [-1.0, -2.0]
    assert all(sample.logprobs is None for sample in desk.last.outputs), "nobody asked for them"
    assert ranked_desk(tokenizer, logprobs=0).last.outputs[0].logprobs is not None


def test_a_sample_without_tokens_ranks_last(tokenizer: FastTokenizer) -> None:
    desk = Desk(tokenizer, n=1, best_of=2, max_tokens=1)
    desk.end("cancelled", index=0)
    entry = TokenLogprobs(token_id=70, logprob=-9.0, rank=1, top=[])
    desk.processor.process([TokenEvent("r", 1, [70], logprobs=[entry], finish_reason="length")])
    assert [sample.token_ids for sample in desk.last.outputs] == [[70]]


def test_a_stop_string_within_min_tokens_stays_in_the_text(tokenizer: FastTokenizer) -> None:
    desk = Desk(tokenizer, stop=["q"], min_tokens=2, max_tokens=9)
    # One token a letter: the second stop counts, the first does not.
    assert desk.feed("xqzw") == []
    assert desk.feed("qx") == [("r", 0)]
    check_stream(desk.outputs)
    sample = desk.last.outputs[0]
    assert (sample.text, sample.stop_reason, len(sample.token_ids)) == ("xqzw", "q", 5)


def test_a_stop_string_that_ends_past_min_tokens_counts(tokenizer: FastTokenizer) -> None:
    desk = Desk(tokenizer, stop=["qzw"], min_tokens=3, max_tokens=9)
    assert desk.feed("xqzw") == [("r", 0)]
    assert (desk.last.outputs[0].text, desk.last.outputs[0].finish_reason) == ("x", "stop")


def test_an_early_stop_string_is_not_lost_at_the_end(tokenizer: FastTokenizer) -> None:
    desk = Desk(tokenizer, stop=["zw"], min_tokens=3, max_tokens=9)
    assert desk.feed("xzw") == []
    desk.end()
    assert (desk.last.outputs[0].text, desk.last.outputs[0].finish_reason) == ("xzw", "length")


def joined(outputs: list[RequestOutput], index: int) -> tuple[str, list[int], int, list[Any]]:
    """Return what the updates of one sample add up to, and the reasons that they named."""
    parts = [sample for output in outputs for sample in output.outputs if sample.index == index]
    num_logprobs = sum(len(part.logprobs or ()) for part in parts)
    reasons = [part.finish_reason for part in parts if part.finish_reason is not None]
    return (
        "".join(part.text for part in parts),
        [i for p in parts for i in p.token_ids],
        num_logprobs,
        reasons,
    )


def test_deltas_hold_each_token_once_and_name_the_end_once(tokenizer: FastTokenizer) -> None:
    desk = Desk(tokenizer, streams="delta", n=2, logprobs=0)
    whole = Desk(tokenizer, streams=False, n=2, logprobs=0)
    for one in (desk, whole):
        for index, text in ((0, "ba de"), (1, "du"), (0, "fi")):
            for token in tokenizer.encode(text):
                logprobs = [TokenLogprobs(token, -1.0, 1, [])]
                one.processor.process([TokenEvent("r", index, [token], logprobs)])
        one.end(index=1)
        one.end(index=0)
    assert [output.finished for output in desk.outputs][-2:] == [False, True]
    for sample in whole.last.outputs:
        expected = (sample.text, sample.token_ids, len(sample.token_ids), ["length"])
        assert joined(desk.outputs, sample.index) == expected
    assert all(len(output.outputs) == 1 for output in desk.outputs[:-1])
    assert desk.last.metrics is not None and desk.outputs[0].metrics is None


def test_a_delta_of_ranked_samples_is_the_whole_at_the_end(tokenizer: FastTokenizer) -> None:
    desk = Desk(tokenizer, streams="delta", n=1, best_of=2)
    for index, logprob in ((0, -2.0), (1, -1.0)):
        desk.processor.process([TokenEvent("r", index, [20 + index], [TokenLogprobs(20, logprob, 1, [])])])
        desk.end(index=index)
    assert len(desk.outputs) == 1 and [sample.token_ids for sample in desk.last.outputs] == [[21]]
    assert desk.last.outputs[0].index == 0 and desk.last.outputs[0].logprobs is None
