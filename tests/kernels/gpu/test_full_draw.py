"""Does the kernel draw from all tokens what cumulative sums of exact masses draw?"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from slipstream.sampling.weights import draw, scale_bits
from tests.kernels.gpu.conftest import HAS_GPU, has_interpreter
from tests.kernels.gpu.plain_libdevice import replace_libdevice

if HAS_GPU or has_interpreter():
    from slipstream.kernels.gpu import full_draw, nucleus


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@pytest.mark.parametrize("vocab", [5, 4096, 9001])
@pytest.mark.parametrize("has_min", [False, True], ids=["", "min_p"])
def test_tokens_are_those_of_the_sums(
    device: str, vocab: int, has_min: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace_libdevice(monkeypatch, nucleus)
    rows, bits = 6, scale_bits(vocab)
    generator = torch.Generator().manual_seed(vocab)
    x = torch.randn(rows, vocab, generator=generator) * 3
    x[0, :3] = -torch.inf
    temperature = torch.rand(rows, generator=generator) + 0.3
    uniform = torch.rand(rows, 2, generator=generator, dtype=torch.float64)
    uniform[1, 0], uniform[2, 0] = 0.0, 1 - 2**-53
    least = (torch.full((rows,), 0.05, dtype=torch.float64) * 2.0**bits).to(torch.int64)
    scaled = ((x - x.amax(-1, keepdim=True)) / temperature[:, None]).to(device)
    raised = scaled.exp() if HAS_GPU else torch.from_numpy(np.exp(scaled.numpy()))
    weights = raised.mul(2.0**bits).to(torch.int64).cpu()
    if has_min:
        weights[weights < least[:, None]] = 0
    expected = draw(weights, uniform[:, 0])
    x[4, vocab // 2], x[5] = torch.nan, -torch.inf
    drawn, status = full_draw.draw_full(
        x.to(device),
        temperature.to(device),
        least.to(device) if has_min else None,
        uniform.to(device)[:, 0],
        bits=bits,
    )
    assert status.tolist() == [0, 0, 0, 0, 1, 2]
    assert drawn.tolist() == [*expected[:4].tolist(), 0, 0]
