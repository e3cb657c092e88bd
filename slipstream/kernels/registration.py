"""How does a function become a registered op? One call per op file, with its schema and its fake.

Invariant: every op of the library lives in the `slipstream` namespace and has a fake, so that graph capture
and export see shapes without running it. The dispatcher is entered directly (`torch.library.impl` on
CompositeExplicitAutograd), which costs half of what `torch.library.custom_op` does.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch

NAMESPACE = "slipstream"

# The defining function of every op, by the op; filled as op files are imported, read by whoever needs the
# plain computation on a device that has something faster.
DEFINITIONS: dict[Any, Callable[..., Any]] = {}


@functools.cache
def has_triton() -> bool:
    """Say whether triton is installed (CUDA builds of torch bring it on Linux), without importing it."""
    return importlib.util.find_spec("triton") is not None


def register_op(
    schema: str,
    function: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    cuda: Callable[..., Any] | None = None,
) -> Any:
    """Register `function` under `schema`, e.g. `"silu_and_mul(Tensor x) -> Tensor"`, and return the op.

    The op computes no gradient. `fake` gets the same arguments and returns empty tensors of the right shape.
    `cuda` computes the same for CUDA tensors, where triton is installed; it imports its kernel when called.
    """
    name = schema.partition("(")[0]
    qualified = f"{NAMESPACE}::{name}"
    torch.library.define(qualified, schema.removeprefix(name))
    torch.library.impl(qualified, "CompositeExplicitAutograd", function)
    torch.library.register_fake(qualified, fake)
    if cuda is not None and has_triton():
        torch.library.impl(qualified, "CUDA", cuda)
    op = getattr(getattr(torch.ops, NAMESPACE), name).default
    DEFINITIONS[op] = function
    return op
