"""How are queries and keys turned by their position?

Each pair (a, b) of a head turns by the angle of its frequency: (a cos - b sin, b cos + a sin). The table
holds the cosine of each element and the sine with the sign its element needs, so that both layouts are one
multiply-add over the head and a swapped copy of it.
Layouts: halves (GPT-NeoX: element i pairs with i + D/2) and interleaved (GPT-J: 2i pairs with 2i + 1).
Source: Su et al., RoFormer, arXiv 2104.09864.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slipstream.kernels.registration import register_op


def rotary(x_TND: Tensor, table_T2D: Tensor, interleaved: bool = False) -> Tensor:
    """Turn every head of `x_TND`; `table_T2D` float32 holds (cosine, signed sine) of each token's position.

    Returns a new tensor of x's type; the product is taken in float32.
    """
    cos_T1D, sin_T1D = table_T2D[:, 0:1], table_T2D[:, 1:2]
    if interleaved:
        swapped = x_TND.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    else:
        swapped = x_TND.roll(x_TND.shape[-1] // 2, -1)
    return torch.addcmul(x_TND * cos_T1D, swapped, sin_T1D).to(x_TND.dtype)


def rotary_table(angles_PF: Tensor, interleaved: bool = False) -> Tensor:
    """Make the [P, 2, D] float32 table of `rotary` from the angle of each position and frequency."""
    cos, sin = angles_PF.cos(), angles_PF.sin()
    if interleaved:
        cos = cos.repeat_interleave(2, dim=-1)
        sin = torch.stack((-sin, sin), dim=-1).flatten(-2)
    else:
        cos, sin = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
    return torch.stack((cos, sin), dim=1)


def _fake(x_TND: Tensor, table_T2D: Tensor, interleaved: bool = False) -> Tensor:
    return torch.empty_like(x_TND, memory_format=torch.contiguous_format)


rotary_op = register_op(
    "rotary(Tensor x_TND, Tensor table_T2D, bool interleaved=False) -> Tensor", rotary, _fake
)
