"""How are a checkpoint's tensors placed: one after another, or several at once?

On a CPU one after another, and straight into its place where the type is the same: reading and converting are
bound by the same memory. To a GPU several threads
place a tensor each, so that reading files, copying and converting overlap (`checkpoint/staging.py`).
Invariant: the first thing that goes wrong is what is raised, after every thread has ended; tensors are begun
in file order.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from slipstream.checkpoint.base import WeightTensor
from slipstream.checkpoint.safetensors_reader import DTYPES
from slipstream.checkpoint.staging import MIN_DIMS, Staging
from slipstream.layers.parameter import Parameter, Slot
from slipstream.models.weight_map import Place

# One thread copies from the page cache at some 3 to 6 GB/s; more than this many gain little.
NUM_THREADS = 6

# Called with (bytes placed so far, bytes in all).
Progress = Callable[[int, int], None]


def place_all(
    places: Mapping[str, Place],
    tensors: Sequence[WeightTensor],
    progress: Progress | None,
    *,
    num_threads: int | None = None,
) -> None:
    """Fill every parameter from its tensor; blocks until all are in place."""
    device = device_of(places)
    if num_threads is None:
        num_threads = NUM_THREADS if device.type == "cuda" else 1
    queue = _Queue(tensors, progress)
    if num_threads == 1:
        for tensor in queue:
            place_one(places[tensor.name], tensor)
            queue.done(tensor)
        return
    failures: list[BaseException] = []

    def work() -> None:
        try:
            staging = Staging(device)
            with staging.stream():
                for tensor in queue:
                    place_one(places[tensor.name], staging.staged(tensor))
                    queue.done(tensor)
        except BaseException as error:
            failures.append(error)
            queue.stop()

    threads = [
        threading.Thread(target=work, name=f"slipstream-weights-{i}", daemon=True) for i in range(num_threads)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def place_one(place: Place, tensor: WeightTensor) -> None:
    if place.parameter is None:
        return
    change = place.transform
    if change is None and read_in_place(place.parameter, tensor, place.slot):
        return
    if change is None:
        place.parameter.place(tensor, place.slot)
    else:
        place.parameter.place(tensor, place.slot, change.apply, change.multiple)


def read_in_place(parameter: Parameter, tensor: WeightTensor, slot: str) -> bool:
    """Read a tensor straight into the memory of a parameter of its type, if it may stay as it is stored.

    Not on a GPU, not where a part of each row is wanted, and not for vectors, which are checked for NaN.
    """
    is_plain = type(parameter) is Parameter and len(tensor.shape) >= MIN_DIMS
    if not is_plain or tensor.read_into is None or parameter.device.type != "cpu":
        return False
    if DTYPES.get(tensor.dtype) != parameter.dtype or not parameter.data.is_contiguous():
        return False
    rule = parameter.slots[slot]
    is_by_columns = (parameter.dim or 0) != 0
    if is_by_columns and rule.length != rule.full:
        return False
    parameter.check_shape(tensor, slot)
    if is_by_columns:
        rule = Slot(tensor.shape[0], 0, tensor.shape[0])
    target = parameter.data[rule.offset : rule.offset + rule.length]
    tensor.read_into(rule.start, rule.start + rule.length, target.view(-1).view(torch.uint8).numpy())
    return True


def device_of(places: Mapping[str, Place]) -> torch.device:
    """Return the device that the parameters are on."""
    filled = (place.parameter for place in places.values() if place.parameter is not None)
    return next((parameter.device for parameter in filled), torch.device("cpu"))


class _Queue:
    """Tensors in file order for any number of threads, and what they have placed."""

    def __init__(self, tensors: Sequence[WeightTensor], progress: Progress | None) -> None:
        self._waiting = iter(tensors)
        self._progress = progress
        self._total, self._placed = sum(tensor.num_bytes for tensor in tensors), 0
        self._is_stopped = False
        self._lock = threading.Lock()

    def __iter__(self) -> Iterator[WeightTensor]:
        while True:
            with self._lock:
                tensor = None if self._is_stopped else next(self._waiting, None)
            if tensor is None:
                return
            yield tensor

    def stop(self) -> None:
        """Hand out no more tensors."""
        self._is_stopped = True

    def done(self, tensor: WeightTensor) -> None:
        with self._lock:
            self._placed += tensor.num_bytes
            if self._progress is not None:
                self._progress(self._placed, self._total)
