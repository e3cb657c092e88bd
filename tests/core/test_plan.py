"""Do plans and results reach another process unchanged, and is anything malformed refused?"""

from __future__ import annotations

import random

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slipstream.core.plan import (
    RequestInit,
    Span,
    StepPlan,
    StepResult,
    TokenLogprobs,
    decode_plan,
    decode_result,
    encode,
)
from slipstream.core.sampling_params import RowSampling

rows = st.integers(0, 2**20)
ids = st.lists(st.integers(0, 2**20), max_size=5)
# float64 survives msgpack exactly; NaN is left out because it equals nothing, itself included.
numbers = st.floats(allow_nan=False)

spans = st.builds(
    Span,
    row=rows,
    start=rows,
    len=st.integers(1, 4096),
    stream=st.sampled_from(["decoder", "encoder"]),
    causal=st.booleans(),
    parents=st.none() | st.lists(rows, max_size=4).map(tuple),
)
samplings = st.builds(
    RowSampling,
    temperature=numbers,
    top_k=rows,
    logit_bias=st.lists(st.tuples(rows, numbers), max_size=3).map(tuple),
    stop_ids=st.lists(rows, max_size=3).map(tuple),
)
inits = st.builds(
    RequestInit,
    row=rows,
    request_id=st.text(max_size=8),
    tokens=ids,
    num_prompt=rows,
    num_computed=rows,
    blocks=st.lists(st.lists(st.integers(-1, 2**20), max_size=3), max_size=3),
    sampling=samplings,
    # A drawn seed fills 64 bits.
    seed=st.integers(0, 2**64 - 1),
    sample_idx=rows,
)
pairs = st.lists(st.tuples(rows, rows), max_size=3)
plans = st.builds(
    StepPlan,
    step_id=rows,
    removed=ids,
    added=st.lists(inits, max_size=2),
    new_blocks=st.dictionaries(rows, st.lists(st.tuples(rows, ids), max_size=2), max_size=2),
    tokens=st.lists(st.tuples(rows, rows, ids), max_size=2),
    copies=pairs,
    loads=pairs,
    spans=st.lists(spans, max_size=3),
    sample=ids,
    logits=st.lists(
        st.tuples(rows, rows, rows, st.sampled_from(["prompt_logprobs", "context_logits", "hidden_states"])),
        max_size=2,
    ),
    stores=pairs,
)
logprobs = st.builds(
    TokenLogprobs,
    token_id=rows,
    logprob=numbers,
    rank=rows,
    top=st.lists(st.tuples(rows, numbers), max_size=2),
)
results = st.builds(
    StepResult,
    step_id=rows,
    tokens=st.dictionaries(rows, ids, max_size=3),
    executed_tokens=rows,
    logprobs=st.dictionaries(rows, st.lists(logprobs, max_size=2), max_size=2),
    accepted_path=st.dictionaries(rows, ids, max_size=2),
    kv_done=st.lists(st.text(max_size=5), max_size=2),
    kv_failed=ids,
    row_errors=st.dictionaries(rows, st.text(max_size=8), max_size=2),
)


@given(plans)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_plan_round_trip(plan: StepPlan) -> None:
    assert decode_plan(encode(plan)) == plan


@given(results)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_result_round_trip(result: StepResult) -> None:
    assert decode_result(encode(result)) == result


def test_num_tokens_sums_the_spans() -> None:
    assert StepPlan(step_id=1).num_tokens == 0
    plan = StepPlan(step_id=1, spans=[Span(row=0, start=5, len=1), Span(row=1, start=0, len=7)])
    assert plan.num_tokens == 8


def test_plans_share_no_default() -> None:
    StepPlan(step_id=1).removed.append(3)
    assert StepPlan(step_id=2).removed == []


def test_spans_cannot_change_once_planned() -> None:
    span = Span(row=0, start=0, len=1)
    with pytest.raises(AttributeError):
        span.len = 2  # pyright: ignore[reportAttributeAccessIssue]


def test_idle_plan_is_small() -> None:
    # Defaults stay off the wire: what is left is one field's name and its number.
    assert len(encode(StepPlan(step_id=1))) <= 16


def test_plan_size_follows_what_changed_not_the_context() -> None:
    def decode_step(context: int) -> bytes:
        span = Span(row=3, start=context, len=1)
        return encode(StepPlan(step_id=9, spans=[span], sample=[3]))

    # A larger position may take a wider integer (at most 5 bytes instead of 1), and nothing else.
    assert len(decode_step(131_072)) - len(decode_step(16)) <= 4


@pytest.mark.parametrize(
    "message",
    [
        {"step_id": "1"},
        {"step_id": 1, "removed": [1.5]},
        {"step_id": 1, "spans": [{"row": 0, "start": 0}]},
        {"step_id": 1, "spans": [{"row": 0, "start": 0, "len": 1, "stream": "sideways"}]},
        {"removed": []},
        [1],
    ],
)
def test_malformed_plans_are_refused(message: object) -> None:
    with pytest.raises(msgspec.ValidationError):
        decode_plan(msgspec.msgpack.encode(message))


def test_truncated_and_random_bytes_are_refused() -> None:
    data = encode(StepPlan(step_id=7, removed=[1, 2, 3], sample=[4]))
    for length in range(len(data)):
        with pytest.raises(msgspec.DecodeError):
            decode_plan(data[:length])
    source = random.Random(0)
    for _ in range(200):
        # 0xC1 is the one byte that msgpack never uses.
        with pytest.raises(msgspec.DecodeError):
            decode_plan(b"\xc1" + source.randbytes(source.randrange(64)))
