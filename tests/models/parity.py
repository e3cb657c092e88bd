"""When do two models agree? Logits to 1e-4 and 64 greedy tokens, on a model where that means something."""

from __future__ import annotations

from typing import Any

import torch

from tests.models.harness import PagedRunner
from tests.models.twins import VOCAB, hf_greedy, hf_logits

# Both sides sum float32 products in a different order: errors of a few 1e-6 of the largest logit after 7
# layers. A wrong scale, angle or mask shows as 1e-2 or more.
TOLERANCE = 1e-4
NUM_NEW = 64
PROMPT_LEN = 37
CHUNKS = (1, 7, PROMPT_LEN)


def prompt_of(length: int, *, seed: int = 11) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCAB, (length,), generator=generator).tolist()


def relative_error(given: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest difference over the largest logit; NaN where any is NaN."""
    return float((given - expected).abs().max() / expected.abs().max())


def assert_same_logits(ours: Any, twin: Any, *, chunk: int) -> None:
    prompt = prompt_of(PROMPT_LEN)
    given = PagedRunner(ours).logits(prompt, chunk=chunk)
    assert given.dtype == torch.float32
    assert relative_error(given, hf_logits(twin, prompt)) <= TOLERANCE


def separated_greedy(twin: Any) -> list[int]:
    """Return the twin's greedy tokens, and assert that they are worth comparing with."""
    expected, gap = hf_greedy(twin, prompt_of(PROMPT_LEN), NUM_NEW)
    assert gap > 1e-3, f"the two best logits come within {gap}: the comparison would prove nothing"
    assert len(set(expected)) >= 8
    return expected


def assert_same_greedy(ours: Any, expected: list[int], *, chunk: int) -> PagedRunner:
    """Decode the prompt beside another one and compare; return the runner for its counters."""
    prompt = prompt_of(PROMPT_LEN)
    runner = PagedRunner(ours)
    other = prompt_of(5, seed=12)
    assert runner.greedy([prompt, other], num_new=NUM_NEW, chunk=chunk)[0] == expected
    return runner
