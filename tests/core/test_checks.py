"""Are lists of ids taken exactly where every one is a whole number of the vocabulary, and named where not?"""

from __future__ import annotations

import enum
import random
from typing import Any

import numpy as np
import pytest

from slipstream.core.checks import checked_ids
from slipstream.core.errors import RequestError
from slipstream.core.limits import Limits

LIMITS = Limits(vocab_size=1000, max_seq_len=100)


class Token(enum.IntEnum):
    """An integer that is not of the type int itself."""

    BEGIN = 7


def test_ids_come_back_as_plain_integers_in_a_list_of_their_own() -> None:
    ids = [random.Random(1).randrange(1000) for _ in range(50)] + [0, 999]
    found = checked_ids(ids, LIMITS, "ids")
    assert found == ids and found is not ids
    assert checked_ids([], LIMITS, "ids") == []
    # Those that are no `int`, but whole numbers all the same.
    mixed = checked_ids([Token.BEGIN, np.int64(5), np.uint8(9)], LIMITS, "ids")
    assert mixed == [7, 5, 9] and {type(token) for token in mixed} == {int}


@pytest.mark.parametrize("bad", [-1, 1000, 2**80, True, 1.0, "1", None, [1], np.float32(1)])
def test_the_first_that_is_none_is_named(bad: Any) -> None:
    with pytest.raises(RequestError, match=r"ids\[3\] must be an integer from 0 to 999, not .*vocabulary"):
        checked_ids([1, 2, 3, bad, 4, bad], LIMITS, "ids")
    # The bound is this model's, not that of one seen before.
    assert checked_ids([1999], Limits(vocab_size=2000, max_seq_len=100), "ids") == [1999]
