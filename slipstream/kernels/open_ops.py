"""What computes one of our ops where no plugin does, and which op is behind a name?

Importing an op's file registers it; torch's dispatcher knows what serves a device.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

from slipstream.kernels.registration import DEFINITIONS, NAMESPACE

# Files that hold an op of another name.
FILES = {"add_rms_norm": "rms_norm"}


def op_of(name: str) -> Any:
    """Return the registered op, its file imported."""
    importlib.import_module(f"slipstream.kernels.{FILES.get(name, name)}")
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def definition_of(name: str) -> Callable[..., Any]:
    """Return the plain function that defines an op."""
    return DEFINITIONS[op_of(name)]


def our_kernel(name: str, device: str) -> Callable[..., Any]:
    """Return what computes an op on a device now, past the dispatcher: our kernel, or the definition."""
    op = op_of(name)
    key = device.upper()
    if not torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), key):
        return DEFINITIONS[op]
    kernel = torch.library.get_kernel(op, key)
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))
    return lambda *arguments: kernel.call_boxed(keys, *arguments)
