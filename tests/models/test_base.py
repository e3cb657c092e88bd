"""Does the loop over layers run all of them, and refuse by name what a batch may carry and nobody serves?"""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch

from slipstream.core.errors import UnsupportedError
from slipstream.models.base import run_layers


def batch(**fields: Any) -> Any:
    return types.SimpleNamespace(**{"adapter_idx_T": None, "num_tokens_per_dp_rank": None} | fields)


def test_layers_run_in_order() -> None:
    layers = [lambda x_TD, _, i=i: x_TD * 10 + i for i in range(1, 4)]
    assert run_layers(layers, torch.zeros(1, 1), batch()).item() == 123


@pytest.mark.parametrize("name", ["adapter_idx_T", "num_tokens_per_dp_rank"])
def test_what_is_not_served_is_refused_by_name(name: str) -> None:
    ran: list[int] = []
    with pytest.raises(UnsupportedError, match=name):
        run_layers([lambda x_TD, _: ran.append(1) or x_TD], torch.zeros(1, 1), batch(**{name: torch.ones(2)}))
    assert not ran
