"""Do option records become a command's options, and then the library's arguments?"""

from __future__ import annotations

import dataclasses
import inspect
from typing import Annotated

import typer

from slipstream.cli.options import HABITS, EngineOptions, SamplingOptions, normalize_name, spread
from slipstream.core.sampling_params import SamplingParams
from slipstream.engine.config import EngineConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    width: Annotated[int, typer.Option()] = 3
    height: Annotated[int, typer.Option()] = 4


def test_a_record_becomes_its_fields_and_comes_back() -> None:
    @spread
    def area(name: str, *, shape: Shape) -> str:
        """Say an area."""
        return f"{name} {shape.width * shape.height}"

    assert list(inspect.signature(area).parameters) == ["name", "width", "height"]
    assert inspect.signature(area).parameters["width"].default == 3
    assert area.__doc__ == "Say an area."
    assert area(name="a", width=5, height=6) == "a 30"


def test_engine_options_are_arguments_of_the_engine() -> None:
    options = EngineOptions(max_seq_len=64, kv_cache_max_tokens=128, kv_cache_max_bytes=1 << 20)
    config = EngineConfig(model="m", **options.to_llm_options(enable_block_reuse=False))
    assert config.max_seq_len == 64
    assert config.kv_cache_config is not None
    assert config.kv_cache_config.max_tokens == 128
    assert config.kv_cache_config.max_gpu_total_bytes == 1 << 20
    assert not config.kv_cache_config.enable_block_reuse


def test_unset_engine_options_leave_the_defaults() -> None:
    config = EngineConfig(model="m", **EngineOptions().to_llm_options())
    own = {"config", "kv_cache_max_tokens", "kv_cache_max_bytes"}
    for name in set(EngineOptions.__dataclass_fields__) - own:
        assert getattr(config, name) == getattr(EngineConfig(model="m"), name), name


def test_unset_sampling_options_are_the_librarys_defaults() -> None:
    assert SamplingOptions().to_params(default_max_tokens=32) == SamplingParams()


def test_sampling_options_reach_the_parameters() -> None:
    given = {
        "max_tokens": 7,
        "min_tokens": 2,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 5,
        "min_p": 0.1,
        "seed": 3,
        "stop": ["x"],
        "ignore_eos": True,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.2,
        "frequency_penalty": 0.3,
    }
    assert set(given) == set(SamplingOptions.__dataclass_fields__)
    options = SamplingOptions(**given)  # type: ignore[arg-type]
    assert options.to_params(default_max_tokens=None) == SamplingParams(**given)


def test_habits_lead_to_names_that_no_other_habit_renames() -> None:
    for habit, ours in HABITS.items():
        assert normalize_name(habit.replace("-", "_")) == ours
        assert normalize_name(ours) == ours
