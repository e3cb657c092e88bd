"""Request.create resolves rules about tokens: ids sorted and unique, texts encoded, signatures read."""

import functools

import pytest

from slipstream.core.errors import RequestError
from slipstream.core.limits import Limits
from slipstream.core.request import Request
from slipstream.core.sampling_params import SamplingParams

LIMITS = Limits(vocab_size=100, max_seq_len=50)
SPELLINGS = {"a": [[5]], "bc": [[6, 7], [8]], "": [[]]}


def create(ids=(1, 2, 3), *, encode_bad=SPELLINGS.get, **params):
    return Request.create(list(ids), SamplingParams(**params), LIMITS, request_id="r", encode_bad=encode_bad)


def refusal(**params):
    with pytest.raises(RequestError) as caught:
        create(**params)
    return caught.value


def test_allowed_ids_are_sorted_and_unique():
    assert create(allowed_token_ids=[9, 4, 9]).sampling.allowed_ids == (4, 9)
    assert create().sampling.allowed_ids == ()


def test_bad_texts_become_ids_and_sequences():
    sampling = create(bad=["a", "bc"], bad_token_ids=[40, 8]).sampling
    assert sampling.bad_ids == (5, 8, 40) and sampling.bad_sequences == ((6, 7),)
    assert create(bad="a").sampling.bad_ids == (5,)
    assert sampling.reads_history and not create(bad="a").sampling.reads_history
    assert create(no_repeat_ngram_size=2).sampling.reads_history


def test_bad_texts_need_a_tokenizer():
    error = refusal(bad="a", encode_bad=None)
    assert error.param == "bad" and "bad_token_ids" in error.message


def test_rules_that_leave_nothing_are_refused():
    assert "leaves no token" in refusal(allowed_token_ids=[5, 8], bad=["a"], bad_token_ids=[8]).message
    assert refusal(bad_token_ids=list(range(100))).param == "bad_token_ids"
    assert create(allowed_token_ids=[5, 9], bad="a").sampling.allowed_ids == (5, 9)


def in_place(req_id, logits, token_ids, stream_ptr, client_id):
    pass


class Processor:
    def __call__(self, token_ids, logits):
        return logits

    def method(self, prompt_token_ids, token_ids, logits):
        return logits


@pytest.mark.parametrize(
    ("processor", "style"),
    [
        (in_place, "in_place"),
        (Processor(), "generated"),
        (Processor().method, "prompt_and_generated"),
        (lambda ids, logits, scale=2.0: logits * scale, "generated"),
        (functools.partial(lambda scale, ids, logits: logits, 2.0), "generated"),
        (lambda ids, logits, *, scale=2.0: logits, "generated"),
    ],
    ids=["five", "object", "method", "default", "partial", "keyword"],
)
def test_a_processor_is_called_as_its_parameters_say(processor, style):
    request = create(logits_processor=processor)
    assert request.processors == ((style, processor),)
    assert request.needs_host_tokens and request.sampling.has_processors
    assert not create().needs_host_tokens and not create().sampling.has_processors


def test_processors_keep_their_order():
    first, second = (lambda a, b: b), in_place
    assert [one for _, one in create(logits_processor=[first, second]).processors] == [first, second]


def test_a_processor_with_other_parameters_is_told_which_are_called():
    message = refusal(logits_processor=[in_place, lambda a: a]).message
    assert message.startswith("logits_processor[1] takes 1 arguments") and "(token_ids, logits)" in message


@pytest.mark.parametrize(
    ("given", "kept"), [(2, [2, 3]), (3, [1, 2, 3]), (99, [1, 2, 3]), (-1, [1, 2, 3]), (None, [1, 2, 3])]
)
def test_prompts_are_truncated_from_the_left(given, kept):
    assert create(truncate_prompt_tokens=given).prompt_token_ids == kept


def test_truncation_saves_a_prompt_that_is_too_long():
    ids = [i % 100 for i in range(300)]
    assert create(ids, truncate_prompt_tokens=-1, max_tokens=10).prompt_token_ids == ids[-40:]
    assert create(ids, truncate_prompt_tokens=-1, max_tokens=None).prompt_token_ids == ids[-49:]
    assert create(ids, truncate_prompt_tokens=20, max_tokens=10).prompt_token_ids == ids[-20:]
    with pytest.raises(RequestError):
        create(ids, truncate_prompt_tokens=60)


def test_only_the_first_sample_asks_for_the_prompts_logits():
    request = create(n=3, prompt_logprobs=2, return_context_logits=True, return_generation_logits=True)
    assert request.logits == ("prompt_logprobs", "context_logits", "generation_logits")
    assert request.sampling.prompt_logprobs == 2
    samples = request.samples()
    assert [sample.logits for sample in samples] == [request.logits, *[("generation_logits",)] * 2]
    assert create().logits == () and create().sampling.prompt_logprobs == -1
