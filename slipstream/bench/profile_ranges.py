"""Which names does a profile show around the kernels? plan, launch, layer i, sample, collect, commit.

The methods of one engine are wrapped while it is watched, and the functions of the CPU kernels' library,
which no profiler would see otherwise. On a GPU the ranges are NVTX ranges too, for Nsight.
Invariant: afterwards every method is the one it was.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator
from typing import Any

import torch
from torch.profiler import record_function

from slipstream.engine.engine import Engine
from slipstream.kernels.cpu.library import LibraryUnavailable, library

NATIVE = "native::"
# Functions of the library that compute; the others say how much memory those need.
COMPUTING = (
    "ss_linear",
    "ss_embedding",
    "ss_argmax",
    "ss_decoder_blocks",
    "ss_norm",
    "ss_decode",
    "ss_attention",
)


@contextlib.contextmanager
def named_ranges(engine: Engine, *, has_nvtx: bool) -> Generator[None]:
    """Name what an engine does while this is entered."""
    runner: Any = engine.runner
    with contextlib.ExitStack() as undo:

        def wrap(owner: Any, method: str, name: str) -> None:
            undo.enter_context(
                _replaced(owner, method, named(getattr(owner, method), name, has_nvtx=has_nvtx))
            )

        for method in ("plan", "commit"):
            wrap(engine.scheduler, method, method)
        for method in ("launch", "sample", "collect"):
            wrap(runner, method, method)
        for i, layer in enumerate(getattr(runner.model, "layers", ())):
            wrap(layer, "forward", f"layer {i}")
        for owner in _native_library():
            for function in COMPUTING:
                wrap(owner, function, NATIVE + function.removeprefix("ss_"))
        yield


def named(function: Callable[..., Any], name: str, *, has_nvtx: bool) -> Callable[..., Any]:
    """Return the function inside a range of that name."""

    def call(*arguments: Any, **options: Any) -> Any:
        if has_nvtx:
            torch.cuda.nvtx.range_push(name)
        try:
            with record_function(name):
                return function(*arguments, **options)
        finally:
            if has_nvtx:
                torch.cuda.nvtx.range_pop()

    return call


def _native_library() -> list[Any]:
    try:
        return [library()]
    except LibraryUnavailable:
        return []


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Generator[None]:
    """Put a value on an instance, in front of what its class has or instead of its own."""
    own = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own is None:
            delattr(owner, name)
        else:
            setattr(owner, name, own)
