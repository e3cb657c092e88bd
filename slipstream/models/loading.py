"""How do a checkpoint's tensors get into a model? Strictly: all is checked before a byte is read.

Invariant: after `load_weights` returns, every slot of every parameter was filled exactly once, by a tensor of
the right shape; otherwise it raised and listed everything that is wrong.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from slipstream.checkpoint.base import Checkpoint, WeightTensor
from slipstream.checkpoint.dummy import DummyCheckpoint
from slipstream.core.errors import CheckpointError
from slipstream.layers.linear import Linear
from slipstream.layers.native_block import BlockList, NativeBlock
from slipstream.models.dense_decoder import DenseDecoder
from slipstream.models.placing import Progress, place_all
from slipstream.models.random_weights import fill_random
from slipstream.models.weight_map import Place

MAX_LISTED = 40


def load_weights(model: Any, checkpoint: Checkpoint, *, progress: Progress | None = None) -> None:
    """Fill `model` from `checkpoint`; peak memory is the parameters plus a few chunks of 8 MB a thread.

    A checkpoint without weights (`load_format="dummy"`) fills it with random ones. Raises CheckpointError
    listing every missing, unexpected, duplicate and misshapen tensor, before it reads any; or naming the
    tensor whose norm, bias or scales are not finite.
    """
    places: Mapping[str, Place] = model.weight_map(checkpoint.format)
    check_coverage(model, places)
    if isinstance(checkpoint, DummyCheckpoint):
        fill_random(model, progress=progress)
    else:
        place_all(places, fitting_tensors(model, checkpoint, places), progress)
    finish_modules(model)


def finish_modules(model: nn.Module) -> None:
    """Let every module take its last form, now that its weights are in place."""
    for module in model.modules():
        if isinstance(module, Linear):
            module.quant.load(module)
        elif isinstance(module, NativeBlock):
            module.find_native()
    for module in model.modules():
        if isinstance(module, BlockList):
            module.find_stacks()
    if isinstance(model, DenseDecoder):
        model.find_native()


def fitting_tensors(
    model: Any, checkpoint: Checkpoint, places: Mapping[str, Place] | None = None
) -> list[WeightTensor]:
    """Return a checkpoint's tensors, nothing read yet. Raises CheckpointError where they do not fit `model`.

    The model may be on the meta device: then a checkpoint is judged without memory for another model.
    """
    if places is None:
        places = model.weight_map(checkpoint.format)
        assert places is not None
    tensors = list(checkpoint.tensors())
    problems = find_problems(places, tensors)
    if problems:
        listed = "\n".join(f"  {problem}" for problem in problems[:MAX_LISTED])
        rest = f"\n  and {len(problems) - MAX_LISTED} more" if len(problems) > MAX_LISTED else ""
        raise CheckpointError(
            f"{checkpoint.path}: its tensors do not fit {type(model).__name__} as configured:\n{listed}{rest}"
        )
    return tensors


def find_problems(places: Mapping[str, Place], tensors: Sequence[WeightTensor]) -> list[str]:
    """Return one line for each missing, unexpected, duplicate or misshapen tensor."""
    counts = Counter(tensor.name for tensor in tensors)
    needed = {name for name, place in places.items() if place.parameter is not None}
    problems = [f"missing: {name}" for name in sorted(needed - counts.keys())]
    problems += [f"unexpected: {name}" for name in sorted(counts.keys() - places.keys())]
    problems += [f"duplicate: {name} ({count} times)" for name, count in sorted(counts.items()) if count > 1]
    return problems + list(_misshapen(places, tensors))


def _misshapen(places: Mapping[str, Place], tensors: Iterable[WeightTensor]) -> Iterable[str]:
    for tensor in tensors:
        place = places.get(tensor.name)
        if place is None or place.parameter is None:
            continue
        expected = place.parameter.expected_shape(place.slot)
        if tuple(tensor.shape) != expected:
            yield f"misshapen: {tensor.name} is {list(tensor.shape)}, the model expects {list(expected)}"


def check_coverage(model: nn.Module, places: Mapping[str, Place]) -> None:
    """Raise CheckpointError for a weight map that forgets a slot: an error of the model, not of the file."""
    filled = Counter(
        (id(place.parameter), place.slot) for place in places.values() if place.parameter is not None
    )
    for name, parameter in model.named_parameters():
        for slot in getattr(parameter, "slots", {"": None}):
            count = filled[(id(parameter), slot)]
            if count != 1:
                raise CheckpointError(
                    f"The weight map of {type(model).__name__} fills {name} (slot {slot!r}) {count} times; "
                    "it must name exactly one tensor for it."
                )
