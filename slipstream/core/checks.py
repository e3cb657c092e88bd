"""Is a value of a request what its field says? Type, range and length checks with one wording.

Invariant: a check costs no more than the size of what it accepts, and a refusal names the field, what was
given (in bounded space) and what is allowed.
"""

from __future__ import annotations

import functools
import numbers
from collections.abc import Callable
from typing import Annotated, Any, cast

import msgspec

from slipstream.core.errors import RequestError
from slipstream.core.limits import Limits


def listed(
    given: Any,
    param: str,
    cap: int,
    cap_name: str,
    error: Callable[[str, str], RequestError] | None = None,
) -> list[Any]:
    """Copy a bounded list, tuple, set or array; the bound is checked before anything is read."""
    is_array = hasattr(given, "tolist") and getattr(given, "ndim", 1) == 1
    if not is_array and not isinstance(given, list | tuple | set | frozenset):
        raise refused(param, f"must be a list, not {shown(given)}")
    values = cast(Any, given)
    size = len(values)
    if size > cap:
        what = f"has {size} entries, at most {cap} ({cap_name}) are allowed; shorten it"
        raise (error or refused)(param, what)
    return list(values.tolist() if is_array else values)


def checked_ids(ids: list[Any], limits: Limits, param: str) -> list[int]:
    """Return a copy, types and range checked at C speed; look for the offender only where there is one."""
    try:
        return msgspec.convert((ids,), _ids_record(limits.vocab_size)).ids
    except msgspec.ValidationError:
        pass
    hint = f"ids are below the vocabulary of {limits.vocab_size}"
    return [integer(t, f"{param}[{i}]", 0, limits.vocab_size - 1, hint) for i, t in enumerate(ids)]


@functools.lru_cache(maxsize=16)
def _ids_record(vocab_size: int) -> Any:
    """Return the type of a record whose `ids` are those of a vocabulary: one pass checks all of them."""
    token_id = Annotated[int, msgspec.Meta(ge=0, lt=vocab_size)]
    return msgspec.defstruct("Ids", [("ids", list[token_id])], array_like=True)


def integer(given: Any, param: str, low: int, high: int | None, hint: str = "") -> int:
    allowed = f"from {low} to {high}" if high is not None else f"of at least {low}"
    is_integer = not isinstance(given, bool) and isinstance(given, numbers.Integral)
    value = cast(int, given)
    if not is_integer or value < low or (high is not None and value > high):
        raise refused(param, f"must be an integer {allowed}, not {shown(given)}{hint and '; '}{hint}")
    return int(value)


def number(given: Any, param: str, low: float, high: float, hint: str = "") -> float:
    is_number = not isinstance(given, bool) and isinstance(given, numbers.Real)
    value = cast(float, given)
    # NaN fails the comparison, and so does an integer too large for a float.
    if not is_number or not low <= value <= high:
        raise refused(
            param, f"must be a number from {low:g} to {high:g}, not {shown(given)}{hint and '; '}{hint}"
        )
    return float(value)


def check_text(given: Any, param: str, cap: int | None) -> None:
    if not isinstance(given, str) or not given:
        raise refused(param, f"must be a non-empty string, not {shown(given)}")
    if cap is not None and len(given) > cap:
        raise refused(param, f"has {len(given)} characters, at most {cap} are allowed; shorten it")
    try:
        given.encode()
    except UnicodeEncodeError as error:
        raise refused(
            param, f"has a lone surrogate at character {error.start}; send well-formed Unicode"
        ) from None


def refused(param: str, what: str) -> RequestError:
    return RequestError(f"{param} {what}.", param=param.partition("[")[0])


def context_error(param: str, what: str) -> RequestError:
    return RequestError(f"{param} {what}.", param=param, code="context_length_exceeded")


def shown(value: object) -> str:
    """Name a hostile value in bounded space: never a whole list, a long string or a million digits."""
    if isinstance(value, str):
        return repr(value[:40]) + ("..." if len(value) > 40 else "")
    if value is None or isinstance(value, bool):
        return repr(value)
    if isinstance(value, numbers.Integral):
        digits = int(value)
        is_short = digits.bit_length() <= 128
        return repr(digits) if is_short else f"an integer of {digits.bit_length()} bits"
    if isinstance(value, numbers.Real) and not isinstance(value, numbers.Rational):
        return repr(float(value))
    return f"a {type(value).__name__}"
