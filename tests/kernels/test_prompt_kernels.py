"""Is Hopper's own kernel of prompts chosen where it can run, and passed over with the reason elsewhere?"""

from __future__ import annotations

from typing import Any

import pytest

from slipstream.attention.triton import TritonAttention
from slipstream.attention.triton_invariant import TritonInvariant
from slipstream.core.cache_group import CacheGroup
from slipstream.kernels.prompt_kernels import describe_prompt_kernel, hopper_obstacle

LLAMA_8B: dict[str, Any] = {"sm": 90, "dtype": "bfloat16", "head_dim": 128, "block_tokens": 32}


def test_an_8b_model_on_hopper_has_it() -> None:
    assert hopper_obstacle(**LLAMA_8B) == ""
    assert describe_prompt_kernel(**LLAMA_8B).startswith("prompts attend by Hopper's own kernel")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"sm": 80}, "compute capability 9.0, and this GPU has 8.0"),
        ({"sm": 100}, "this GPU has 10.0"),
        ({"dtype": "float32"}, "not float32"),
        ({"head_dim": 80}, "heads of 64, 128, 256, not of 80"),
        ({"block_tokens": 4}, "a multiple of 8 tokens, not of 4"),
    ],
)
def test_others_are_told_why_not(change: dict[str, Any], reason: str) -> None:
    assert reason in hopper_obstacle(**LLAMA_8B | change)
    assert "general kernel" in describe_prompt_kernel(**LLAMA_8B | change)


def test_the_backend_says_it_once_for_layers_alike() -> None:
    full, window = (
        CacheGroup(layers=(i,), kind=kind, heads=2, head_dim=128, block_tokens=32, window=64 * i)
        for i, kind in enumerate(("full", "window"))
    )
    assert TritonAttention().describe_kernels([full, window], sm=90, dtype="bfloat16") == [
        describe_prompt_kernel(**LLAMA_8B)
    ]
    assert TritonInvariant().describe_kernels([full], sm=90, dtype="bfloat16") == []
