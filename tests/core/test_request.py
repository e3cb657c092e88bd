"""Request.create refuses all that is out of bounds, naming the field, what was given and what is allowed."""

import dataclasses
import inspect
import math
import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slipstream.core import beam_params
from slipstream.core import request as request_module
from slipstream.core.errors import RequestError
from slipstream.core.kv_retention import KvCacheRetentionConfig
from slipstream.core.limits import Limits
from slipstream.core.request import Request, RequestOptions
from slipstream.core.sampling_params import SamplingParams

LIMITS = Limits(vocab_size=1000, max_seq_len=100, eos_token_ids=(2, 7))


def short(value):
    """Name a parameter in a test's id; some are too large to print."""
    return value if isinstance(value, str) and len(value) < 30 else type(value).__name__


def create(ids=(5, 6, 8), limits=LIMITS, **params):
    return Request.create(list(ids), SamplingParams(**params), limits, request_id="r")


def refusal(ids=(5, 6, 8), limits=LIMITS, **params):
    with pytest.raises(RequestError) as caught:
        create(ids, limits, **params)
    return caught.value


def test_a_plain_request_is_resolved():
    request = create(max_tokens=10)
    assert request.prompt_token_ids == [5, 6, 8]
    assert request.max_tokens == 10
    assert request.stop_token_ids == {2, 7}
    assert request.sampling.is_greedy and request.sampling.stop_ids == ()
    assert (request.sample_idx, request.num_samples, request.stop) == (0, 1, ())


def test_the_prompt_is_copied():
    ids = [5, 6]
    request = Request.create(ids, SamplingParams(), LIMITS, request_id="r")
    ids.append(10**9)
    assert request.prompt_token_ids == [5, 6]


@pytest.mark.parametrize("ids", [[], [[]], [[5]], [1.0], [True], [None], ["5"], [-1], [1000], [2**63]])
def test_bad_prompts_are_refused_by_name(ids):
    error = refusal(ids)
    assert error.param == "prompt_token_ids" and error.code == "invalid_value"


def test_the_offending_token_is_named():
    assert "prompt_token_ids[2]" in refusal([1, 2, -3]).message


@pytest.mark.parametrize("ids", ["abc", b"abc", 5, None, {1: 2}, np.zeros((2, 2), np.int64), np.array(3)])
def test_a_prompt_that_is_no_list_is_refused(ids):
    with pytest.raises(RequestError) as caught:
        Request.create(ids, SamplingParams(), LIMITS, request_id="r")
    assert caught.value.param == "prompt_token_ids"


def test_numpy_integers_are_integers():
    for ids in (np.arange(3), [np.int32(0), np.int64(1), 2]):
        request = Request.create(ids, SamplingParams(top_k=np.int64(3)), LIMITS, request_id="r")
        assert request.prompt_token_ids == [0, 1, 2]
        assert set(map(type, request.prompt_token_ids)) == {int} and type(request.sampling.top_k) is int


def test_a_million_tokens_are_checked_in_a_blink():
    limits = Limits(vocab_size=1000, max_seq_len=2_000_000)
    ids = list(range(1000)) * 1000
    start = time.perf_counter()
    create(ids, limits)
    # About 0.05 s on one core; a Python loop over the tokens takes 10 times as long.
    assert time.perf_counter() - start < 1.0


def test_context_bounds_are_exact():
    assert create([1] * 60, max_tokens=40).max_tokens == 40
    error = refusal([1] * 60, max_tokens=41)
    assert error.code == "context_length_exceeded" and error.param == "max_tokens"
    assert all(number in error.message for number in ("41", "60", "100"))


def test_unset_max_tokens_fills_the_context():
    assert create([1] * 99, max_tokens=None).max_tokens == 1
    error = refusal([1] * 100, max_tokens=None)
    assert error.code == "context_length_exceeded"
    assert "100" in error.message and "99" in error.message


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "5"])
def test_max_tokens_must_be_a_positive_integer(value):
    error = refusal(max_tokens=value)
    assert error.param == "max_tokens" and error.code == "invalid_value"


@pytest.mark.parametrize("value", [2**63, 10**5000], ids=["63 bits", "5000 digits"])
def test_huge_max_tokens_exceed_the_context(value):
    error = refusal(max_tokens=value)
    assert error.code == "context_length_exceeded" and len(error.message) < 300


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", -1),
        ("temperature", 1e-40),
        ("temperature", 10**400),
        ("temperature", True),
        ("temperature", "hot"),
        ("temperature", 1j),
        ("top_p", 0),
        ("top_p", 1.0001),
        ("top_p", math.nan),
        ("top_k", 2**31),
        ("top_k", -2),
        ("top_k", 3.0),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("repetition_penalty", 0),
        ("repetition_penalty", 1e308),
        ("repetition_penalty", 1e-40),
        ("presence_penalty", -1e308),
        ("frequency_penalty", math.inf),
        ("frequency_penalty", None),
        ("logprobs", -1),
        ("logprobs", 65),
        ("logprobs", True),
        ("n", 0),
        ("n", 10**9),
        ("n", 1025),
        ("best_of", 0),
        ("best_of", 1025),
        ("best_of", True),
        ("min_tokens", -1),
        ("min_tokens", 33),
        ("seed", 2**64),
        ("seed", -(2**63) - 1),
        ("seed", 1.0),
        ("stop", ""),
        ("stop", ["a", ""]),
        ("stop", ["a"] * 10_000),
        ("stop", "a" * 2**20),
        ("stop", "\ud800"),
        ("stop", [1]),
        ("stop", b"a"),
        ("stop_token_ids", [1000]),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", [math.nan]),
        ("stop_token_ids", [1] * 10**6),
        ("stop_token_ids", 5),
        ("logit_bias", {1000: 1.0}),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", {"1": 1.0}),
        ("logit_bias", {1: math.nan}),
        ("logit_bias", {1: 101}),
        ("logit_bias", [(1, 1.0)]),
        ("logit_bias", dict.fromkeys(range(10**6), 0.0)),
        ("cache_salt", ""),
        ("cache_salt", "a" * 257),
        ("cache_salt", "two words"),
        ("cache_salt", "\udfff"),
        ("cache_salt", "naïve"),
        ("cache_salt", 5),
        ("ignore_eos", 1),
        ("detokenize", None),
        ("return_context_logits", 1),
        ("return_generation_logits", None),
        ("bad", ""),
        ("bad", ["x"]),
        ("bad", 5),
        ("bad", "a" * 2**20),
        ("bad", ["a"] * 10_000),
        ("bad_token_ids", [1000]),
        ("bad_token_ids", [1] * 10**6),
        ("bad_token_ids", range(1000)),
        ("bad_token_ids", list(range(1000))),
        ("allowed_token_ids", []),
        ("allowed_token_ids", [-1]),
        ("allowed_token_ids", [1] * 1001),
        ("no_repeat_ngram_size", -1),
        ("no_repeat_ngram_size", 257),
        ("no_repeat_ngram_size", 2.0),
        ("prompt_logprobs", -1),
        ("prompt_logprobs", 65),
        ("truncate_prompt_tokens", 0),
        ("truncate_prompt_tokens", -2),
        ("truncate_prompt_tokens", "all"),
        ("logits_processor", 5),
        ("logits_processor", [len, 5]),
        ("logits_processor", lambda a: a),
        ("logits_processor", [lambda a, b: b] * 65),
    ],
    ids=short,
)
def test_out_of_bounds_is_refused_by_name(name, value):
    error = refusal(**{name: value})
    assert error.param == name and error.code == "invalid_value"
    assert error.message.startswith(name) and len(error.message) < 300


def test_the_offending_entry_is_named():
    assert "logit_bias[17]" in refusal(logit_bias={3: 1.0, 17: math.inf}).message
    assert "1234" in refusal(logit_bias={1234: 0.0}).message
    assert "stop_token_ids[1]" in refusal(stop_token_ids=[3, 1000]).message


def test_bounds_themselves_are_allowed():
    request = create(
        temperature=1e-3, top_p=1.0, top_k=-1, min_p=1.0, repetition_penalty=100, logprobs=64, n=1024, seed=-1
    )
    assert request.seed == 2**64 - 1
    assert request.sampling.top_k == 0
    assert create(logprobs=0).sampling.logprobs == 0 and create().sampling.logprobs == -1
    assert create(temperature=1.0, top_k=2**31 - 1).sampling.top_k == 0, "more than the vocabulary is off"


@pytest.mark.parametrize(
    ("params", "temperature"),
    [({}, 0.0), ({"top_p": 0.5}, 1.0), ({"top_k": 4}, 1.0), ({"temperature": 0, "top_k": 4}, 0.0)],
)
def test_greedy_unless_asked(params, temperature):
    sampling = create(**params).sampling
    assert sampling.temperature == temperature
    if temperature == 0.0:
        assert (sampling.top_k, sampling.top_p, sampling.min_p) == (0, 1.0, 0.0)


def test_a_tiny_temperature_is_refused_with_advice():
    assert "use 0 for greedy" in refusal(temperature=1e-40).message


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("guided_decoding", np.zeros(2)),
    ],
    ids=short,
)
def test_what_is_not_served_is_refused_not_ignored(name, value):
    error = refusal(**{name: value})
    assert error.code == "unsupported" and error.param == name
    assert "not served by this version" in error.message


def test_every_field_is_either_read_or_refused():
    """A field added to SamplingParams has to be handled in core/request.py."""
    source = inspect.getsource(request_module) + inspect.getsource(beam_params)
    for field in dataclasses.fields(SamplingParams):
        is_read = f"params.{field.name}" in source or field.name in request_module.FLAGS
        assert is_read or field.name in request_module.UNSERVED, field.name


def test_stop_tokens_are_the_models_and_the_users():
    assert create(stop_token_ids=[9, 9]).stop_token_ids == {2, 7, 9}
    assert create(ignore_eos=True).stop_token_ids == frozenset()
    assert create(ignore_eos=True, stop_token_ids=(9,)).stop_token_ids == {9}
    assert create(min_tokens=1, stop_token_ids={9}).sampling.stop_ids == (2, 7, 9)
    out_of_vocab = Limits(vocab_size=1000, max_seq_len=100, eos_token_ids=(2, 1000))
    assert create(limits=out_of_vocab, min_tokens=1).sampling.stop_ids == (2,)


@pytest.mark.parametrize("value", [-(2**31), -1, 0, 7, 2**31 - 1])
def test_priorities(value):
    assert create(priority=value).priority == value


@pytest.mark.parametrize("value", [-(2**31) - 1, 2**31, 1.0, True, None, "high"])
def test_priorities_are_bounded(value):
    assert refusal(priority=value).param == "priority"


def with_options(**options):
    options = RequestOptions(**options)
    return Request.create([1], SamplingParams(), LIMITS, request_id="r", arrival_s=5.0, options=options)


def test_a_timeout_counts_from_the_arrival():
    assert with_options(timeout_s=0.25).deadline_s == 5.25 and with_options().deadline_s is None
    assert [sample.deadline_s for sample in create(n=2).samples()] == [None, None]


@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf, 1e9, True, "soon"])
def test_timeouts_are_bounded(value):
    with pytest.raises(RequestError) as caught:
        with_options(timeout_s=value)
    assert caught.value.param == "timeout_s" and "None for no time-out" in caught.value.message


def test_retention_is_of_its_own_kind():
    kept = KvCacheRetentionConfig(decode_retention_priority=1)
    assert with_options(kv_retention=kept).kv_retention is kept
    with pytest.raises(RequestError, match="must be a KvCacheRetentionConfig, not a dict"):
        with_options(kv_retention={"decode_retention_priority": 1})


def test_stop_strings_need_text():
    assert create(stop="a").stop == ("a",) and create(stop=["b", "é"]).stop == ("b", "é")
    assert "stop_token_ids" in refusal(stop="a", detokenize=False).message
    assert create(stop=[], detokenize=False).stop == ()


def test_seeds():
    assert create().seed != create().seed, "an unseeded request draws fresh randomness"
    seeded = Request.create([1], SamplingParams(), LIMITS, request_id="r", default_seed=11)
    assert seeded.seed == 11
    own = Request.create([1], SamplingParams(seed=0), LIMITS, request_id="r", default_seed=11)
    assert own.seed == 0, "the request's own seed wins, 0 included"


def test_samples_share_all_but_their_index():
    request = create(n=3, seed=4, cache_salt="s")
    children = request.samples()
    assert [(c.sample_idx, c.num_samples, c.seed) for c in children] == [(0, 1, 4), (1, 1, 4), (2, 1, 4)]
    assert all(c.prompt_token_ids is request.prompt_token_ids for c in children)
    assert children[2].samples() == [children[2]]


def test_a_billion_samples_cost_nothing_to_refuse():
    tracemalloc.start()
    try:
        refusal(n=10**9)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2**20


@pytest.mark.parametrize("request_id", ["", None, 5, "x" * 257, "\ud800"])
def test_request_ids_are_checked(request_id):
    with pytest.raises(RequestError) as caught:
        Request.create([1], SamplingParams(), LIMITS, request_id=request_id)
    assert caught.value.param == "request_id"


def test_prompt_text_must_be_unicode():
    with pytest.raises(RequestError, match="surrogate"):
        Request.create([1], SamplingParams(), LIMITS, request_id="r", prompt="a\ud800")
    assert Request.create([1], SamplingParams(), LIMITS, request_id="r", prompt="").prompt == ""


def test_params_of_another_kind_are_refused():
    with pytest.raises(RequestError, match="SamplingParams"):
        Request.create([1], {"temperature": 1.0}, LIMITS, request_id="r")


ANYTHING = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.integers() | st.floats() | st.text(max_size=3), max_size=3),
    st.dictionaries(st.integers(), st.floats(), max_size=3),
)
CHECKED = [
    "max_tokens min_tokens n temperature top_p top_k min_p seed stop stop_token_ids logit_bias ignore_eos",
    "repetition_penalty presence_penalty frequency_penalty logprobs detokenize cache_salt best_of priority",
]


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.dictionaries(st.sampled_from(" ".join(CHECKED).split()), ANYTHING, max_size=3))
def test_whatever_is_accepted_is_finite_and_in_bounds(params):
    request, refused = None, ""
    try:
        request = create(**params)
    except RequestError as error:
        refused = error.param
    if request is None:
        assert refused in params
        return
    s = request.sampling
    numbers = [s.temperature, s.top_p, s.min_p, s.repetition_penalty, s.presence_penalty, s.frequency_penalty]
    assert all(math.isfinite(x) for x in numbers)
    assert s.temperature == 0.0 or 1e-3 <= s.temperature <= 100
    assert 0 < s.top_p <= 1 and 0 <= s.top_k < 1000 and 0 <= s.min_p <= 1 and -1 <= s.logprobs <= 64
    assert 0 <= s.min_tokens <= request.max_tokens <= 97 and 0 <= request.seed < 2**64
    assert all(0 <= t < 1000 and abs(b) <= 100 for t, b in s.logit_bias)
