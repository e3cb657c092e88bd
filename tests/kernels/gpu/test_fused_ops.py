"""Does each fused kernel compute what its definition does, in every type and at ragged sizes?"""

from __future__ import annotations

import pytest
import torch

from slipstream.kernels.fused_linear import GATED, fused_linear
from slipstream.kernels.gelu_and_mul import gelu_and_mul
from slipstream.kernels.rms_norm import add_rms_norm, rms_norm
from slipstream.kernels.rotary import rotary_table
from slipstream.kernels.rotary_store import rotary_store
from slipstream.kernels.silu_and_mul import silu_and_mul
from tests.kernels.gpu.conftest import HAS_GPU, has_interpreter

if HAS_GPU or has_interpreter():
    from slipstream.kernels.gpu import gated_activation as activations
    from slipstream.kernels.gpu import gemv as gemv_file
    from slipstream.kernels.gpu import rms_norm as norms
    from slipstream.kernels.gpu import rotary_store as rotaries

# Half a unit of the result, and in narrow types another where the definition rounds in between.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
# The interpreter computes in numpy, which has no bfloat16.
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if HAS_GPU else [])


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu") -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def assert_close(given: torch.Tensor, expected: torch.Tensor) -> None:
    bound = TOLERANCE[expected.dtype]
    torch.testing.assert_close(given, expected, rtol=bound, atol=bound)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 8), (7, 576), (3, 4, 64), (2, 1), (2, 4097)])
def test_norms(device: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, residual = draw(*shape, dtype=dtype, device=device), draw(*shape, seed=1, dtype=dtype, device=device)
    weight = draw(shape[-1], seed=2, device=device)
    assert_close(norms.rms_norm(x, weight, 1e-5), rms_norm(x, weight, 1e-5))
    normed, total = norms.add_rms_norm(x, residual, weight, 1e-5)
    expected, expected_total = add_rms_norm(x, residual, weight, 1e-5)
    assert_close(normed, expected)
    assert torch.equal(total, expected_total)


def test_norm_of_a_slice(device: str) -> None:
    x, weight = draw(5, 6, 32, device=device)[:, 1:3], draw(32, seed=1, device=device)
    assert_close(norms.rms_norm(x, weight, 1e-6), rms_norm(x, weight, 1e-6))
    assert norms.rms_norm(x[:0], weight, 1e-6).shape == (0, 2, 32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 2), (5, 192), (2, 3, 2050)])
def test_gated_activations(device: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = 3 * draw(*shape, dtype=dtype, device=device)
    pairs = [
        (activations.SILU, silu_and_mul(x)),
        (activations.GELU, gelu_and_mul(x)),
        (activations.GELU_TANH, gelu_and_mul(x, "tanh")),
    ]
    for kind, expected in pairs:
        assert_close(activations.gated_activation(x, kind), expected)
    assert activations.gated_activation(x[:0], 0).shape == (0, *shape[1:-1], shape[-1] // 2)


@pytest.mark.parametrize("has_norms", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 2, 64), (9, 3, 80), (1, 1, 16)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rotary_store(
    device: str,
    dtype: torch.dtype,
    heads: int,
    kv_heads: int,
    head_dim: int,
    interleaved: bool,
    has_norms: bool,
) -> None:
    tokens, page_tokens = 5, 8
    qkv = draw(tokens, (heads + 2 * kv_heads) * head_dim, dtype=dtype, device=device)
    table = rotary_table(draw(40, head_dim // 2, seed=1), interleaved).to(device)
    positions = torch.tensor([3, 0, 39, 7, 7], device=device)
    slots = torch.tensor([9, -1, 31, 0, 16], device=device)
    norm = [draw(head_dim, seed=s, device=device) for s in (2, 3)] if has_norms else [None, None]
    pages = [torch.zeros(4, 3, 2, page_tokens, kv_heads, head_dim, dtype=dtype, device=device) for _ in "ab"]
    settings = (table, positions, *norm, 1e-6, interleaved, heads)
    q = rotaries.rotary_store(qkv, *settings, pages[0][:, 1], slots)
    expected = rotary_store(qkv, *settings, pages[1][:, 1], slots)
    assert_close(q, expected)
    assert_close(pages[0], pages[1])
    # Four tokens of the layer in the middle, K and V.
    assert int((pages[0].abs().flatten(4).sum(-1) > 0).sum()) == 2 * 4
    assert rotaries.rotary_store(qkv[:0], *settings, pages[0][:, 1], slots[:0]).shape == (0, heads, head_dim)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("outputs", "inputs"), [(8, 64), (12, 300), *([(96, 1500), (4, 1024)] if HAS_GPU else [])]
)
@pytest.mark.parametrize("has_all", [False, True])
def test_gemv(device: str, outputs: int, inputs: int, dtype: torch.dtype, has_all: bool) -> None:
    x = draw(1, inputs, dtype=dtype, device=device)
    weight = draw(outputs, inputs, seed=1, dtype=dtype, device=device) * inputs**-0.5
    norm = draw(inputs, seed=2, device=device) if has_all else None
    bias = draw(outputs, seed=3, dtype=dtype, device=device) if has_all else None
    for activation in ("", *GATED):
        is_gated = bool(activation)
        size = outputs // 2 if is_gated else outputs
        residual = draw(1, size, seed=4, dtype=dtype, device=device) if has_all else None
        for tile in ((4, 1024, 4), (2, 64, 2)):
            given = gemv_file.gemv(
                x,
                weight,
                norm_I=norm,
                eps=1e-5,
                bias_O=bias,
                residual_1O=residual,
                activation=GATED[activation][0] if is_gated else gemv_file.NO_ACTIVATION,
                tile=tile,
            )
            # In float64: the kernel rounds once, the definition in narrow types after every op.
            wide = [None if t is None else t.double() for t in (norm, bias, residual)]
            expected = fused_linear(x.double(), weight.double(), wide[0], 1e-5, wide[1], activation, wide[2])
            assert given.dtype == dtype
            assert_close(given, expected.to(dtype))
