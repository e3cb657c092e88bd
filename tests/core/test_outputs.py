"""Does what there is one of per token stay out of sight of Python's collector?"""

from __future__ import annotations

import copy
import gc
import pickle

from slipstream.core.outputs import Logprob, TokenEvent
from slipstream.core.plan import TokenLogprobs


def test_what_comes_once_a_token_is_not_walked() -> None:
    """A full collection is due once a quarter as many objects as there are have come to stay."""
    found = TokenLogprobs(3, -0.5, 1, [(3, -0.5), (4, -1.25)])
    event = TokenEvent("r", 0, [3], [found])
    assert not any(gc.is_tracked(one) for one in (found, event, Logprob(-0.5, 1, "a")))
    # What they refer to lives as long as they do.
    gc.collect()
    assert event.logprobs[0].top == [(3, -0.5), (4, -1.25)]


def test_a_logprob_is_a_record() -> None:
    one = Logprob(-0.5, 1)
    one.decoded_token = "a"
    assert one == Logprob(-0.5, 1, "a") != Logprob(-0.5, 2, "a")
    assert copy.deepcopy(one) == pickle.loads(pickle.dumps(one)) == one
    assert repr(one) == "Logprob(logprob=-0.5, rank=1, decoded_token='a')"
