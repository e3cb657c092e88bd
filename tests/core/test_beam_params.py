"""Is a beam search taken in every form people write it, and refused with a sentence where it cannot work?"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from slipstream.core.beam_params import MAX_LENGTH_PENALTY
from slipstream.core.errors import RequestError
from slipstream.core.limits import MAX_BEAM_WIDTH, Limits
from slipstream.core.request import Request
from slipstream.core.sampling_params import SamplingParams

LIMITS = Limits(vocab_size=100, max_seq_len=64, eos_token_ids=(2, 7))


def create(**params: Any) -> Request:
    return Request.create([5, 6, 8], SamplingParams(**params), LIMITS, request_id="r")


def search(**params: Any) -> Request:
    return create(use_beam_search=True, **params)


def refusal(**params: Any) -> RequestError:
    with pytest.raises(RequestError) as caught:
        create(**params)
    return caught.value


def test_defaults_are_those_of_transformers() -> None:
    beams = search(beam_width=4).beams
    assert beams is not None
    assert (beams.width, beams.length_penalty, beams.early_stopping) == (4, 1.0, False)
    assert create().beams is None and create().sampling.num_candidates == 0


def test_one_search_is_one_sequence_with_n_outputs() -> None:
    request = search(beam_width=4, n=3)
    assert request.samples() == [request] and request.num_samples == request.num_returned == 3


def test_unset_the_width_is_n() -> None:
    beams = search(n=3).beams
    assert beams is not None and beams.width == 3
    assert "beam_width must be set" in refusal(use_beam_search=True).message


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        *((None, False), (False, False), (True, True), ("never", "never")),
        # TensorRT-LLM's numbers.
        *((0, False), (1, True), (2, "never"), (-1, "never"), (np.int32(1), True)),
    ],
)
def test_forms_of_early_stopping(given: Any, meant: Any) -> None:
    beams = search(beam_width=2, early_stopping=given).beams
    assert beams is not None and beams.early_stopping is meant


@pytest.mark.parametrize("given", ["always", 0.5, [True], "", np.zeros(2)], ids=repr)
def test_other_forms_of_early_stopping_are_refused(given: Any) -> None:
    error = refusal(use_beam_search=True, beam_width=2, early_stopping=given)
    assert error.param == "early_stopping" and "True, False or 'never'" in error.message


def test_enough_candidates_that_width_of_them_go_on() -> None:
    assert search(beam_width=4).sampling.num_candidates == 4 + 2
    assert search(beam_width=4, stop_token_ids=[9, 10]).sampling.num_candidates == 4 + 4
    assert search(beam_width=4, ignore_eos=True).sampling.num_candidates == 4
    assert search(beam_width=60, stop_token_ids=list(range(90))).sampling.num_candidates == 100


@pytest.mark.parametrize(
    ("params", "param", "said"),
    [
        ({"beam_width": 0}, "beam_width", f"from 1 to {MAX_BEAM_WIDTH}"),
        ({"beam_width": MAX_BEAM_WIDTH + 1}, "beam_width", "max_beam_width"),
        ({"beam_width": 2.0}, "beam_width", "integer"),
        ({"beam_width": True}, "beam_width", "integer"),
        ({"beam_width": 2, "n": 3}, "n", r"beam_width \(2\)"),
        ({"beam_width": 2, "length_penalty": "1"}, "length_penalty", "number"),
        ({"beam_width": 2, "length_penalty": float("nan")}, "length_penalty", "number"),
        ({"beam_width": 2, "length_penalty": MAX_LENGTH_PENALTY * 2}, "length_penalty", "10"),
        ({"beam_width": 3, "allowed_token_ids": [4, 5]}, "allowed_token_ids", "beam_width=3"),
    ],
    ids=str,
)
def test_numbers_out_of_bounds(params: dict[str, Any], param: str, said: str) -> None:
    error = refusal(use_beam_search=True, **params)
    assert error.param == param and re.search(said, error.message)


@pytest.mark.parametrize("given", ["yes", 1, None, np.zeros(2)], ids=repr)
def test_use_beam_search_is_a_flag(given: Any) -> None:
    assert "use_beam_search must be True or False" in refusal(use_beam_search=given).message


@pytest.mark.parametrize(
    ("name", "value"), [("beam_width", 4), ("length_penalty", 1.0), ("early_stopping", False)]
)
def test_options_of_a_search_need_one(name: str, value: Any) -> None:
    error = refusal(**{name: value})
    assert error.param == name and "use_beam_search=True" in error.message


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 0.7),
        ("top_p", 0.9),
        ("top_k", 5),
        ("best_of", 2),
        ("logit_bias", {5: 1.0}),
        ("logits_processor", lambda token_ids, logits: logits),
        ("stop", ["x"]),
        ("repetition_penalty", 1.1),
        ("presence_penalty", 0.1),
        ("frequency_penalty", 0.1),
    ],
)
def test_what_a_search_cannot_serve_is_refused_by_name(name: str, value: Any) -> None:
    error = refusal(use_beam_search=True, beam_width=2, **{name: value})
    assert error.param == name
    assert "does not combine with use_beam_search" in error.message and name in error.message


def test_all_that_clashes_is_named_at_once() -> None:
    message = refusal(use_beam_search=True, beam_width=2, temperature=1.0, top_p=0.5, stop="x").message
    assert "leave out stop and temperature and top_p" in message


def test_what_changes_nothing_is_taken() -> None:
    assert search(beam_width=2, temperature=0, repetition_penalty=1.0, seed=3).beams is not None
    assert search(beam_width=2, min_tokens=3, bad_token_ids=[9], no_repeat_ngram_size=2).beams is not None
