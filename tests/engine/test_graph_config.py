"""Are captured sizes what was asked for, refused where nothing can be captured, and off where turned off?"""

from __future__ import annotations

from typing import Any

import pytest

from slipstream.core.errors import ConfigError, UnsupportedError
from slipstream.engine.config import EngineConfig
from slipstream.engine.graph_config import DEFAULT_SIZES, CudaGraphConfig
from slipstream.engine.resolution import ModelFacts, resolve

FACTS = ModelFacts(vocab_size=100, max_position_embeddings=64, dtype="bfloat16")


def sizes_of(**options: Any) -> tuple[int, ...]:
    return resolve(EngineConfig(model="m", **options), FACTS, has_cuda=True).graph_sizes


def test_sizes_follow_the_bounds() -> None:
    assert sizes_of() == DEFAULT_SIZES and DEFAULT_SIZES[-1] == 1024
    assert sizes_of(max_batch_size=5) == (1, 2, 3, 4, 5)
    assert sizes_of(cuda_graph_config=CudaGraphConfig(max_batch_size=7)) == (1, 2, 3, 4, 6, 7)
    asked = CudaGraphConfig(batch_sizes=[8, 1, 8, 64])
    assert sizes_of(cuda_graph_config=asked) == (1, 8, 64)
    assert sizes_of(cuda_graph_config=asked, max_batch_size=32) == (1, 8)
    assert sizes_of(enforce_eager=True) == ()


def test_padding_is_a_choice() -> None:
    config = EngineConfig(model="m", cuda_graph_config=CudaGraphConfig(enable_padding=False))
    assert not resolve(config, FACTS, has_cuda=True).has_graph_padding
    assert resolve(EngineConfig(model="m"), FACTS, has_cuda=True).has_graph_padding


def test_the_budget_is_a_choice() -> None:
    config = EngineConfig(model="m", cuda_graph_config=CudaGraphConfig(capture_budget_s=0))
    assert resolve(config, FACTS, has_cuda=True).capture_budget_s == 0
    assert resolve(EngineConfig(model="m"), FACTS, has_cuda=True).capture_budget_s == 4.0


def test_a_cpu_captures_nothing_and_refuses_to_be_asked() -> None:
    assert resolve(EngineConfig(model="m", device="cpu"), FACTS, has_cuda=True).graph_sizes == ()
    config = EngineConfig(model="m", device="cpu", cuda_graph_config=CudaGraphConfig())
    with pytest.raises(UnsupportedError, match="the device is a CPU, where nothing is captured"):
        resolve(config, FACTS, has_cuda=False)


def test_two_options_that_contradict_each_other() -> None:
    with pytest.raises(ConfigError, match="leave one out"):
        sizes_of(enforce_eager=True, cuda_graph_config=CudaGraphConfig())


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"batch_sizes": []}, "at least one whole number from 1 to 4096"),
        ({"batch_sizes": [0]}, "batch_sizes"),
        ({"batch_sizes": [True]}, "batch_sizes"),
        ({"batch_sizes": "12"}, "batch_sizes"),
        ({"max_batch_size": 0}, "max_batch_size=0"),
        ({"enable_padding": 1}, "enable_padding=1"),
        ({"capture_budget_s": -1}, "capture_budget_s=-1.* from 0"),
        ({"capture_budget_s": True}, "capture_budget_s=True"),
        ({"capture_budget_s": "2"}, "capture_budget_s='2'"),
        ({"capture_budget_s": float("nan")}, "capture_budget_s=nan"),
        ({"capture_budget_s": 601}, "to 600"),
        ({"batch_size": [1]}, "Did you mean 'batch_sizes'"),
    ],
)
def test_wrong_values_are_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        CudaGraphConfig(**options)


def test_a_dict_is_no_section() -> None:
    with pytest.raises(ConfigError, match="must be a CudaGraphConfig, not dict"):
        EngineConfig(model="m", cuda_graph_config={"max_batch_size": 8})  # type: ignore[arg-type]
