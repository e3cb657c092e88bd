"""How do the hidden states of a prompt become one vector? A registry of functions of [tokens, D] to [D].

The hidden states are those after the final norm, as transformers' `last_hidden_state` has them. Sums run in
float64, so that a prompt's vector does not depend on the chunks it was computed in.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slipstream.core.errors import ConfigError, RequestError, nearest
from slipstream.core.outputs import EmbeddingOutput, RequestOutput
from slipstream.core.request import Request

Parts = Sequence[NDArray[np.float32]]


def mean(parts: Parts) -> NDArray[Any]:
    total = sum(part.sum(axis=0, dtype=np.float64) for part in parts)
    return np.asarray(total / sum(len(part) for part in parts))


def last(parts: Parts) -> NDArray[Any]:
    return parts[-1][-1]


def cls(parts: Parts) -> NDArray[Any]:
    return parts[0][0]


POOLINGS: dict[str, Callable[[Parts], NDArray[Any]]] = {"mean": mean, "last": last, "cls": cls}


def check_pooling(pooling: str) -> None:
    """Raise ConfigError for a name that is not in the table."""
    if pooling not in POOLINGS:
        raise ConfigError(
            f"pooling={pooling!r} is unknown; valid: {', '.join(POOLINGS)}.{nearest(str(pooling), POOLINGS)}"
        )


def hidden_states_only(request: Request) -> Request:
    """Return a request that ends with its prompt and brings the hidden states of all of it."""
    return dataclasses.replace(request, max_tokens=0, logits=("hidden_states",))


def pool(output: RequestOutput, pooling: str, *, normalize: bool) -> EmbeddingOutput:
    """Turn what a request for hidden states brought into its vector; `normalize` gives it length 1."""
    embedding = EmbeddingOutput(output.request_id, output.prompt, output.prompt_token_ids, error=output.error)
    if embedding.error is None and sum(map(len, output.hidden_states)) != len(output.prompt_token_ids):
        reason = output.outputs[0].finish_reason
        embedding.error = RequestError(
            f"The prompt was not computed to its end (finish reason {reason!r}); send it again.",
            code="processing_error",
        )
    if embedding.error is not None:
        return embedding
    vector = POOLINGS[pooling](output.hidden_states).astype(np.float64)
    length = float(np.linalg.norm(vector))
    # A vector of zeros has no direction: it stays as it is.
    embedding.embedding = (vector / length if normalize and length else vector).astype(np.float32)
    return embedding
