"""Does every exported C function have a row with its types, and as many of them as the source?"""

from __future__ import annotations

import ctypes
import re

import pytest

from slipstream.kernels.cpu.build import SOURCES
from slipstream.kernels.cpu.signatures import SIGNATURES, declare

_EXPORT = re.compile(r"^SS_EXPORT\s+([\w:]+\*?)\s+(\w+)\(([^)]*)\)", re.MULTILINE)
_RESULTS = {
    "void": None,
    "int32_t": ctypes.c_int32,
    "int64_t": ctypes.c_int64,
    "size_t": ctypes.c_size_t,
}
_VALUES = {"int32_t": ctypes.c_int32, "int64_t": ctypes.c_int64, "float": ctypes.c_float}


def exported() -> dict[str, tuple[object, list[object]]]:
    """Return what the sources say: each function's result and argument types as ctypes has them."""
    found: dict[str, tuple[object, list[object]]] = {}
    for path in sorted(SOURCES.glob("*.*")):
        for result, name, arguments in _EXPORT.findall(path.read_text(encoding="utf-8")):
            found[name] = (_RESULTS[result], [ctype_of(a) for a in arguments.split(",") if a.strip()])
    return found


def ctype_of(argument: str) -> object:
    return ctypes.c_void_p if "*" in argument else _VALUES[argument.split()[-2]]


def test_the_sources_export_functions() -> None:
    assert {"ss_pack", "ss_linear"} <= set(exported())


@pytest.mark.parametrize("name", sorted({*SIGNATURES, *exported()}))
def test_row_and_source_agree(name: str) -> None:
    result, arguments = exported()[name]
    assert SIGNATURES[name] == (result, tuple(arguments))


def test_types_are_declared() -> None:
    class Function:
        restype: object = None
        argtypes: object = None

    class Library:
        ss_argmax = Function()

    declare(Library())  # type: ignore[arg-type]
    assert Library.ss_argmax.argtypes == list(SIGNATURES["ss_argmax"][1])
