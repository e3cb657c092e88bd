"""Do both layouts of rotary pairs turn by their angle, and keep what a rotation keeps?"""

from __future__ import annotations

import pytest
import torch

from slipstream.kernels.rotary import rotary, rotary_table


def pairs(x: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """Return the complex number of each rotary pair, [T, N, D / 2]."""
    if interleaved:
        return torch.complex(x[..., 0::2].double(), x[..., 1::2].double())
    half = x.shape[-1] // 2
    return torch.complex(x[..., :half].double(), x[..., half:].double())


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("size", [2, 16, 80, 128])
def test_each_pair_turns_by_its_angle(size: int, interleaved: bool) -> None:
    generator = torch.Generator().manual_seed(size)
    x = torch.randn(6, 3, size, generator=generator)
    angles = 10 * torch.randn(6, size // 2, generator=generator)
    given = rotary(x, rotary_table(angles, interleaved), interleaved)
    expected = pairs(x, interleaved) * torch.polar(torch.ones_like(angles), angles).unsqueeze(1)
    # float32 sines of angles up to about 30: an error of a few 1e-6.
    assert float((pairs(given, interleaved) - expected).abs().max()) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_result_keeps_the_type(dtype: torch.dtype) -> None:
    x = torch.randn(2, 2, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    table = rotary_table(torch.zeros(2, 4))
    assert torch.equal(rotary(x, table), x)


def test_strided_heads_are_accepted() -> None:
    whole = torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(0))
    table = rotary_table(torch.arange(16.0).reshape(4, 4))
    assert torch.equal(rotary(whole[:, 1:3], table), rotary(whole[:, 1:3].contiguous(), table))
