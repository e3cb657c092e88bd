"""SamplingParams takes the names people know and no others; RowSampling crosses to the ranks unchanged."""

import dataclasses

import msgspec
import pytest

from slipstream.core.errors import ConfigError
from slipstream.core.sampling_params import RowSampling, SamplingParams


def test_defaults_ask_for_a_short_greedy_answer():
    params = SamplingParams()
    assert (params.max_tokens, params.n, params.temperature, params.seed) == (32, 1, None, None)


@pytest.mark.parametrize(
    ("alias", "name", "value"),
    [
        ("max_new_tokens", "max_tokens", 7),
        ("min_new_tokens", "min_tokens", 3),
        ("bad_words", "bad", ["x"]),
        ("structured_outputs", "guided_decoding", {"json": {}}),
        ("random_seed", "seed", 5),
    ],
)
def test_names_from_habit_mean_the_same(alias, name, value):
    assert getattr(SamplingParams(**{alias: value}), name) == value


def test_a_name_and_its_alias_together_are_refused():
    with pytest.raises(ConfigError, match="twice"):
        SamplingParams(max_tokens=1, max_new_tokens=2)


def test_an_unknown_name_is_refused_with_the_nearest_one():
    with pytest.raises(ConfigError, match="Did you mean 'temperature'"):
        SamplingParams(temprature=1.0)


def test_params_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SamplingParams().seed = 1


def test_row_sampling_round_trips_through_msgpack():
    row = RowSampling(
        temperature=0.7, top_k=5, logit_bias=((3, -1.5), (9, 2.0)), stop_ids=(1, 2), min_tokens=4, logprobs=0
    )
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(row), type=RowSampling) == row


@pytest.mark.parametrize("penalty", ["repetition_penalty", "presence_penalty", "frequency_penalty"])
def test_each_penalty_is_noticed(penalty):
    assert not RowSampling().has_penalties
    assert RowSampling(**{penalty: 0.5}).has_penalties


def test_greedy_is_temperature_zero():
    assert RowSampling().is_greedy and not RowSampling(temperature=0.001).is_greedy
