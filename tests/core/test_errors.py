"""Can a caller tell by class who has to act, and does a suggestion name only what is close?"""

from __future__ import annotations

import pytest

from slipstream.core import errors


@pytest.mark.parametrize(
    ("error", "builtin"),
    [
        (errors.ConfigError, ValueError),
        (errors.UnsupportedError, ValueError),
        (errors.MissingExtraError, ImportError),
        (errors.OutOfMemoryError, MemoryError),
        (errors.EngineError, RuntimeError),
        (errors.RequestError, ValueError),
    ],
)
def test_errors_are_ours_and_pythons(error: type[Exception], builtin: type[Exception]) -> None:
    for expected in (errors.SlipstreamError, builtin):
        with pytest.raises(expected, match="what to do"):
            raise error("what to do")


def test_who_has_to_act_stays_apart() -> None:
    assert issubclass(errors.UnsupportedError, errors.ConfigError)
    apart = [errors.ConfigError, errors.CheckpointError, errors.RequestError, errors.EngineError]
    for error in apart:
        assert [other for other in apart if issubclass(error, other)] == [error]


def test_request_error_names_field_and_code() -> None:
    error = errors.RequestError("top_p=2 given", param="top_p", code="unsupported")
    assert (str(error), error.message, error.param, error.code) == (
        "top_p=2 given",
        "top_p=2 given",
        "top_p",
        "unsupported",
    )


def test_request_error_defaults() -> None:
    error = errors.RequestError("no")
    assert (error.param, error.code) == ("", "invalid_value")


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [
        ("tmperature", " Did you mean 'temperature'?"),
        ("top_p", " Did you mean 'top_p'?"),
        ("zzz", ""),
        ("", ""),
    ],
)
def test_nearest(name: str, suggestion: str) -> None:
    assert errors.nearest(name, ["temperature", "top_p"]) == suggestion


def test_nearest_takes_any_iterable() -> None:
    assert errors.nearest("stop", iter(["stops"])) == " Did you mean 'stops'?"
