"""Does a request that its gate let through arrive as it was, whatever was asked of it?"""

from __future__ import annotations

import dataclasses
import random
import time
from typing import Any

import msgspec
import pytest

from slipstream.core.errors import RequestError
from slipstream.core.kv_retention import KvCacheRetentionConfig, TokenRangeRetentionConfig
from slipstream.core.limits import Limits
from slipstream.core.request import Request, RequestOptions
from slipstream.core.sampling_params import SamplingParams
from slipstream.engine.pooling import hidden_states_only
from slipstream.engine.request_message import RequestMessage, message_of, read_request

LIMITS = Limits(vocab_size=500, max_seq_len=200, eos_token_ids=(1, 2), max_beam_width=8)
# What makes text stays at the door.
LEFT_BEHIND = {"request_id", "prompt", "params", "stop"}

ASKED: dict[str, dict[str, Any]] = {
    "nothing": {},
    "sampling": {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "seed": 2**64 - 1},
    "a negative seed": {"temperature": 1.0, "seed": -5},
    "penalties": {"repetition_penalty": 1.2, "presence_penalty": -2.0, "frequency_penalty": 100.0},
    "lists": {"logit_bias": {5: 100.0, 6: -100.0}, "allowed_token_ids": [5, 6, 7], "bad_token_ids": [7]},
    "bad texts": {"bad": ["ab", "c"], "no_repeat_ngram_size": 3},
    "stops": {"stop_token_ids": list(range(100, 300)), "min_tokens": 5, "stop": ["x"]},
    "logprobs": {"logprobs": 64, "prompt_logprobs": 0},
    "logits": {"return_context_logits": True, "return_generation_logits": True},
    "samples": {"n": 3, "best_of": 5, "temperature": 1.0},
    "a search": {"use_beam_search": True, "beam_width": 8, "n": 2, "early_stopping": "never"},
    "a salted late one": {"cache_salt": "tenant-a", "priority": 2**31 - 1, "ignore_eos": True},
    "the whole context": {"max_tokens": None},
}


def create(prompt: list[int], asked: dict[str, Any], **more: Any) -> Request:
    params = SamplingParams(**asked)
    return Request.create(
        prompt, params, LIMITS, request_id="r" * 256, encode_bad=lambda text: [[9], [8, 9]], **more
    )


def cross(request: Request) -> Request:
    data = msgspec.msgpack.encode(message_of(request))
    message = msgspec.msgpack.decode(data, type=RequestMessage)
    return read_request(message, LIMITS, prefix="3.", now_s=time.monotonic())


def check_same(request: Request, arrived: Request) -> None:
    assert arrived.request_id == "3." + request.request_id
    for field in dataclasses.fields(Request):
        if field.name not in LEFT_BEHIND:
            assert getattr(arrived, field.name) == getattr(request, field.name), field.name


@pytest.mark.parametrize("name", ASKED)
def test_every_field_arrives(name: str) -> None:
    check_same(request := create([5, 6, 499], ASKED[name]), cross(request))


def test_options_arrive() -> None:
    ranges = [
        TokenRangeRetentionConfig(token_start=0, token_end=2, priority=0, duration_ms=10),
        TokenRangeRetentionConfig(token_start=2, priority=100),
    ]
    retention = KvCacheRetentionConfig(token_range_retention_configs=ranges, decode_retention_priority=99)
    options = RequestOptions(timeout_s=30.0, kv_retention=retention)
    check_same(request := create([5], {}, options=options), cross(request))


def test_a_request_that_embeds_arrives() -> None:
    check_same(request := hidden_states_only(create([5] * 199, {"max_tokens": 1})), cross(request))


def test_the_limits_themselves_are_let_through() -> None:
    for length in (1, 199):
        request = create([0] * length, {"max_tokens": 200 - length})
        check_same(request, cross(request))


def test_whatever_the_gate_lets_through_arrives() -> None:
    """Both gates agree over random mixes of what may be asked."""
    rng = random.Random(4)
    num_made = 0
    for _ in range(300):
        asked: dict[str, Any] = {"max_tokens": rng.randrange(6, 150)}
        for other in rng.sample(list(ASKED.values()), rng.randrange(4)):
            asked |= {name: value for name, value in other.items() if name != "max_tokens"}
        prompt = [rng.randrange(500) for _ in range(rng.randrange(1, 50))]
        try:
            request = create(prompt, asked)
        except RequestError:
            continue
        num_made += 1
        check_same(request, cross(request))
    assert num_made > 150


def test_callables_stay_here() -> None:
    with pytest.raises(RequestError, match="needs the engine in this process"):
        message_of(create([5], {"logits_processor": lambda ids, logits: logits}))
