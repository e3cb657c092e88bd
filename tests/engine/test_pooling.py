"""Does pooling see a prompt the same however it was cut, and never pool a part of one?"""

from __future__ import annotations

import numpy as np
import pytest

from slipstream.core.errors import ConfigError, RequestError
from slipstream.core.outputs import CompletionOutput, RequestOutput
from slipstream.engine.pooling import POOLINGS, check_pooling, pool

STATES = np.random.default_rng(0).normal(size=(10, 4)).astype(np.float32)


def output_of(parts: list[np.ndarray], *, error: RequestError | None = None) -> RequestOutput:
    sample = CompletionOutput(0, finish_reason="length")
    return RequestOutput("r", None, list(range(10)), [sample], hidden_states=parts, error=error)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("cuts", [[], [3], [1, 9], list(range(1, 10))])
def test_chunks_do_not_matter(pooling: str, cuts: list[int]) -> None:
    whole = pool(output_of([STATES]), pooling, normalize=False).embedding
    parts = pool(output_of(np.split(STATES, cuts)), pooling, normalize=False).embedding
    expected = {"mean": STATES.mean(0), "last": STATES[-1], "cls": STATES[0]}[pooling]
    # The mean is summed in float64, so one rounding to float32 is all that differs.
    np.testing.assert_allclose(whole, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(parts, whole, rtol=2e-7, atol=0)


def test_normalized_vectors_have_length_one_and_zeros_stay() -> None:
    unit = pool(output_of([STATES]), "mean", normalize=True).embedding
    assert np.isclose(np.linalg.norm(unit), 1.0, atol=1e-6)
    zeros = pool(output_of([np.zeros((10, 4), np.float32)]), "mean", normalize=True).embedding
    assert not zeros.any()


def test_a_part_of_a_prompt_is_an_error() -> None:
    embedding = pool(output_of([STATES[:7]]), "mean", normalize=False)
    assert embedding.embedding is None and isinstance(embedding.error, RequestError)
    given = RequestError("refused")
    assert pool(output_of([], error=given), "mean", normalize=False).error is given


def test_an_unknown_pooling_is_refused() -> None:
    check_pooling("last")
    with pytest.raises(ConfigError, match="'first' is unknown; valid: mean, last, cls"):
        check_pooling("first")
