"""How do stored bytes get to a GPU as fast as the file gives them? Through pinned buffers, in turn.

A chunk is read straight into page-locked memory and copied to the device on the current stream, while the
next one is read into another buffer; who takes the chunk gets a tensor on the device and converts it there.
Invariant: a buffer is written again only once the copy out of it is done. One `Staging` serves one thread,
with a stream of its own, so that several files or tensors are read at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Generator
from typing import Any

import torch
from torch import Tensor

from slipstream.checkpoint.base import WeightTensor
from slipstream.checkpoint.safetensors_reader import DTYPES

NUM_BUFFERS = 2
# Chunks are a few megabytes; a buffer grows where one row is larger.
MIN_BUFFER_BYTES = 8 << 20
# Vectors are checked for NaN as they are placed, which waits for the device: they come as they always do.
MIN_DIMS = 2


class Staging:
    """The buffers of one thread that loads to `device`. Without a GPU the same in ordinary memory."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._is_gpu = device.type == "cuda"
        self._buffers = [torch.empty(0, dtype=torch.uint8)] * NUM_BUFFERS
        self._copied: list[Any] = [None] * NUM_BUFFERS
        self._next = 0
        self.num_bytes = 0

    @contextlib.contextmanager
    def stream(self) -> Generator[None]:
        """Run what is inside on a stream of its own, behind what the device does now; waits at the end."""
        if not self._is_gpu:
            yield
            return
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            yield
        side.synchronize()

    def staged(self, tensor: WeightTensor) -> WeightTensor:
        """Return the tensor with a `read` that brings rows to the device, where that can be done."""
        if tensor.read_into is None or len(tensor.shape) < MIN_DIMS:
            return tensor
        return dataclasses.replace(tensor, read=lambda start, stop: self._read(tensor, start, stop))

    def _read(self, tensor: WeightTensor, start: int, stop: int) -> Tensor:
        """Return rows start..stop on the device; only enqueues the copy."""
        assert tensor.read_into is not None
        row_bytes = tensor.num_bytes // tensor.shape[0] if tensor.shape[0] else 0
        host = self._buffer((stop - start) * row_bytes)
        tensor.read_into(start, stop, host.numpy())
        chunk = torch.empty_like(host, device=self.device)
        chunk.copy_(host, non_blocking=True)
        self._mark()
        self.num_bytes += host.numel()
        return chunk.view(DTYPES[tensor.dtype]).view(stop - start, *tensor.shape[1:])

    def _buffer(self, num_bytes: int) -> Tensor:
        """Return the next buffer, once it is free again, cut to a size."""
        copied = self._copied[self._next]
        if copied is not None:
            copied.synchronize()
        if self._buffers[self._next].numel() < num_bytes:
            size = max(num_bytes, MIN_BUFFER_BYTES)
            self._buffers[self._next] = torch.empty(size, dtype=torch.uint8, pin_memory=self._is_gpu)
        return self._buffers[self._next][:num_bytes]

    def _mark(self) -> None:
        """Remember when the copy out of the buffer at hand is done, and go to the next."""
        if self._is_gpu:
            event = torch.cuda.Event()
            event.record()
            self._copied[self._next] = event
        self._next = (self._next + 1) % NUM_BUFFERS
