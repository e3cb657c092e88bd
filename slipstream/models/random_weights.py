"""How does a model run without its weights? With random ones, made where they are kept.

Matrices are normal with the deviation 1 / sqrt(inputs), so that every product keeps the size of its input and
the logits of a deep model stay finite in 16 bits; norms are ones, biases zeros.
Invariant: the same model, device type and seed give the same weights; no copy of a parameter is ever made.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from slipstream.core.errors import UnsupportedError
from slipstream.layers.parameter import Parameter

SEED = 0
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# A CPU draws a normal number in about 10 ns and copies one in 1: it draws this many and repeats them. A
# prime, so that no two rows of a matrix start at the same one.
TILE_ELEMENTS = 4_194_301


def fill_random(
    model: nn.Module, *, seed: int = SEED, progress: Callable[[int, int], None] | None = None
) -> None:
    """Fill every parameter in place, one kernel for each. Does not wait for the device.

    `progress` gets (bytes filled so far, bytes in all). Raises UnsupportedError, before it fills anything,
    for a parameter that is not kept in floating point of 16 bits or more.
    """
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        if parameter.dtype not in DTYPES:
            raise UnsupportedError(
                f"load_format='dummy': {name} is kept as {parameter.dtype}, which has no random weights; "
                "load real weights, or leave the quantisation out."
            )
    total, done = sum(parameter.nbytes for parameter in parameters.values()), 0
    noise = _Noise(seed)
    for name, parameter in parameters.items():
        _fill(name.rpartition(".")[2], parameter, noise)
        done += parameter.nbytes
        if progress is not None:
            progress(done, total)


def _fill(name: str, parameter: nn.Parameter, noise: _Noise) -> None:
    data = parameter.data
    if name == "bias":
        data.zero_()
    elif data.ndim == 1:
        data.fill_(1.0)
    else:
        is_cut_by_columns = isinstance(parameter, Parameter) and parameter.dim not in (None, 0)
        slots = parameter.slots if isinstance(parameter, Parameter) else {}
        inputs = slots[""].full if is_cut_by_columns else data.shape[-1]
        # Padding rows behind the last slot (of a vocabulary) stay zero.
        ends = [slot.offset + slot.length for slot in slots.values()]
        used = data if is_cut_by_columns or not ends else data[: max(ends)]
        noise.fill(used, inputs**-0.5)


class _Noise:
    """Normal numbers from one seed, on whichever device a tensor is. Tensors must be contiguous."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.generators: dict[torch.device, torch.Generator] = {}
        self.tiles: dict[torch.dtype, Tensor] = {}
        self.position = 0

    def fill(self, x: Tensor, deviation: float) -> None:
        """Fill `x` with normal numbers of this deviation."""
        if x.device.type == "cpu":
            self._fill_by_tile(x.reshape(-1), deviation)
        else:
            x.normal_(0.0, deviation, generator=self._generator(x.device))

    def _generator(self, device: torch.device) -> torch.Generator:
        if device not in self.generators:
            self.generators[device] = torch.Generator(device).manual_seed(self.seed)
        return self.generators[device]

    def _fill_by_tile(self, flat: Tensor, deviation: float) -> None:
        if flat.dtype not in self.tiles:
            tile = torch.empty(TILE_ELEMENTS).normal_(generator=self._generator(flat.device))
            self.tiles[flat.dtype] = tile.to(flat.dtype)
        tile, done = self.tiles[flat.dtype], 0
        while done < flat.numel():
            count = min(flat.numel() - done, TILE_ELEMENTS - self.position)
            part = tile[self.position : self.position + count]
            torch.mul(part, deviation, out=flat[done : done + count])
            done += count
            self.position = (self.position + count) % TILE_ELEMENTS
