"""What are the C functions of the kernel library called with? One row per function: result, then arguments.

Invariant: a function with a row is checked for at load and called with these types; without one, ctypes takes
what it is given, and a 64-bit pointer passed as a plain int would be cut to 32 bits.
"""

from __future__ import annotations

import ctypes
from typing import Any

# name -> (result, argument types)
SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {}


def declare(library: ctypes.CDLL) -> None:
    """Give each function of the table its types. Raises AttributeError where the library lacks one."""
    for name, (result, arguments) in SIGNATURES.items():
        function = getattr(library, name)
        function.restype = result
        function.argtypes = list(arguments)
