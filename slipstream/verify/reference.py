"""What is a model judged by? The same modules in float32, with torch attention and the plain definitions.

Invariant: nothing of the tested model is in it but sizes: weights are read from the checkpoint again (random
ones, which no file holds, are copied), keys and values stand in pages of its own.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Generator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from slipstream.attention.torch_reference import TorchReference
from slipstream.checkpoint.dummy import DummyCheckpoint
from slipstream.checkpoint.opening import open_checkpoint
from slipstream.core.batch import ForwardBatch
from slipstream.kernels.registration import DEFINITIONS
from slipstream.models.loading import load_weights
from slipstream.parallel.mesh import Mesh
from slipstream.quant.unquantized import Unquantized


class PlainDefinitions(TorchDispatchMode):
    """Inside, every op of the library runs as the function that defines it, whatever the device offers."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        function: Any = DEFINITIONS.get(func, func)
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def exact_float32() -> Generator[None]:
    """Keep all bits of float32 products on a GPU, where TF32 would keep 10."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


class Reference:
    """The float32 twin of `model`, its weights read from `source` as the engine was told to."""

    def __init__(
        self, model: Any, source: str | Path, *, load_format: str, revision: str | None, device: torch.device
    ) -> None:
        self.model: Any = type(model)(
            model.config, mesh=Mesh(), quant=Unquantized(), dtype=torch.float32, device=device
        )
        checkpoint = open_checkpoint(source, load_format=load_format, revision=revision)
        try:
            if isinstance(checkpoint, DummyCheckpoint):
                self._copy_weights(model)
            else:
                load_weights(self.model, checkpoint)
        finally:
            checkpoint.close()
        self._backend = TorchReference()
        self._pages: dict[tuple[bool, int], Tensor] = {}
        self._seen: ForwardBatch | None = None
        self._batches: list[ForwardBatch] = []
        self.num_batches = 0

    def _copy_weights(self, model: Any) -> None:
        tested = dict(model.named_parameters())
        for name, parameter in self.model.named_parameters():
            parameter.data.copy_(tested[name].data)

    def run(self, module_name: str, method: str, arguments: tuple[Any, ...]) -> Any:
        """Call a method of the module of that name with the tested module's arguments, widened."""
        module = self.model.get_submodule(module_name)
        has_parts = next(module.children(), None) is not None
        with torch.inference_mode(), exact_float32(), PlainDefinitions():
            return getattr(module, method)(*(self._own(argument, has_parts) for argument in arguments))

    def _own(self, argument: Any, has_parts: bool) -> Any:
        if isinstance(argument, ForwardBatch):
            return self.batches_like(argument)[has_parts]
        if isinstance(argument, Tensor) and argument.is_floating_point():
            return argument.float().clone()
        return argument

    def batches_like(self, batch: ForwardBatch) -> list[ForwardBatch]:
        """Return the batch over pages of the reference's own, for single ops and for what contains them.

        Attention alone is given keys and values of the tested model; a layer computes its own, and reading
        one from where the other wrote would blame the wrong one. Made once for each step.
        """
        if self._seen is not batch:
            self.num_batches += 1
            self._seen = batch
            self._batches = [self._over_own_pages(batch, has_parts) for has_parts in (False, True)]
        return self._batches

    def _over_own_pages(self, batch: ForwardBatch, has_parts: bool) -> ForwardBatch:
        plan = batch.attention_plan
        own = self._backend.plan(query_lens=plan.query_lens, max_seq_lens=plan.max_seq_lens)
        own.tree_T = plan.tree_T
        pages = [self._pages_like(given, has_parts) for given in batch.kv_pages]
        return dataclasses.replace(batch, kv_pages=pages, attention_plan=own)

    def _pages_like(self, given: Tensor, has_parts: bool) -> Tensor:
        """Groups that share one tensor of the engine share one here."""
        key = (has_parts, given.data_ptr())
        if key not in self._pages:
            self._pages[key] = torch.zeros(given.shape, dtype=torch.float32, device=given.device)
        return self._pages[key]
