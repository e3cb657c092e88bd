"""Do two products with a norm between them compute linear, add, norm, linear, however their work is cut?

The kernels need one CUDA device of compute capability 9.0; their outputs are poisoned before they run.
"""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import linear

from slipstream.kernels.fused_linear import fused_linear_op
from slipstream.kernels.gelu_and_mul import gelu_tanh_and_mul
from slipstream.kernels.registration import has_triton
from slipstream.kernels.rms_norm import rms_norm
from slipstream.kernels.scaled_linear import NUM_COUNTERS, linear_then_norm_op, scaled_linear_op
from slipstream.kernels.silu_and_mul import silu_and_mul

EPS = 1e-5
# bfloat16 keeps 8 bits: 2^-9 = 2e-3 for each rounding of a result, of which there are at most three.
TOLERANCE = 6e-3


def draw(*shape: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def relative(given: torch.Tensor, expected: torch.Tensor) -> float:
    difference = (given.double() - expected.double()).norm() / expected.double().norm()
    return float(difference) if bool(given.isfinite().all()) else float("inf")


def test_the_definition_is_the_composition() -> None:
    x, weight, residual, norm = (
        draw(5, 16, seed=0),
        draw(24, 16, seed=1),
        draw(5, 24, seed=2),
        draw(24, seed=3),
    )
    bias, counters = draw(24, seed=4), torch.zeros(NUM_COUNTERS, dtype=torch.int32)
    total, ready, squares = linear_then_norm_op(x, weight, bias, residual, norm, EPS, counters)
    torch.testing.assert_close(total, linear(x, weight, bias) + residual)
    torch.testing.assert_close(ready, rms_norm(total, norm, EPS))
    gate_up = draw(32, 24, seed=5)
    mixed = scaled_linear_op(ready, squares, EPS, gate_up, None, "silu", None, counters)
    torch.testing.assert_close(mixed, silu_and_mul(linear(ready, gate_up)))


def test_squares_stand_for_a_norms_scale() -> None:
    x, norm, weight = draw(5, 16, seed=0), draw(16, seed=1), draw(8, 16, seed=2)
    squares = (x * x).view(5, 2, 8).sum(-1).T.contiguous()
    counters = torch.zeros(NUM_COUNTERS, dtype=torch.int32)
    y = scaled_linear_op(x * norm, squares, EPS, weight, None, "", None, counters)
    torch.testing.assert_close(y, linear(rms_norm(x, norm, EPS), weight))


@pytest.mark.parametrize("op", [linear_then_norm_op, scaled_linear_op])
def test_ops_keep_schema_and_fake(op: object) -> None:
    x, weight, other, norm = draw(5, 16, seed=0), draw(16, 16, seed=1), draw(5, 16, seed=2), draw(16, seed=3)
    counters = torch.zeros(NUM_COUNTERS, dtype=torch.int32)
    arguments = (x, weight, None, other, norm, EPS, counters)
    if op is scaled_linear_op:
        arguments = (x, x[:0, :5], EPS, weight, None, "", other, counters)
    torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))


SHAPES = {"square": (4096, 4096), "down": (4096, 14336), "odd": (2056, 1064), "small": (64, 128)}


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [2, 7, 16, 31, 64, 65, 128, 200, 256, 257])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_chain_of_two_products(shape: str, tokens: int) -> None:
    """Sum, norm and gated product as a block runs them, against float64 on the same rounded inputs."""
    outputs, inputs = SHAPES[shape]
    x, residual = (draw(tokens, n, seed=n).bfloat16().cuda() for n in (inputs, outputs))
    weight = draw(outputs, inputs, seed=1, scale=inputs**-0.5).bfloat16().cuda()
    gate_up = draw(2 * 1024, outputs, seed=2, scale=outputs**-0.5).bfloat16().cuda()
    norm = draw(outputs, seed=3).abs().cuda() + 0.5
    bias = draw(outputs, seed=4).bfloat16().cuda()
    counters = torch.zeros(NUM_COUNTERS, dtype=torch.int32, device="cuda")
    wide = torch.full((tokens, outputs), torch.nan, device="cuda").bfloat16()
    del wide
    for _ in range(2):
        total, ready, squares = linear_then_norm_op(x, weight, bias, residual, norm, EPS, counters)
        mixed = scaled_linear_op(ready, squares, EPS, gate_up, None, "silu", None, counters)
    sums = linear(x.double(), weight.double(), bias.double()) + residual.double()
    assert relative(total, sums) < TOLERANCE
    normed = rms_norm(sums.float(), norm, EPS).double()
    expected = silu_and_mul(linear(normed, gate_up.double()))
    assert relative(mixed, expected) < 2 * TOLERANCE
    assert not bool(counters.any())


@pytest.mark.gpu
@pytest.mark.skipif(not has_triton(), reason="the kernels are written in triton")
def test_every_tile_of_the_table_is_right() -> None:
    from slipstream.kernels.gpu.matmul import matmul
    from slipstream.kernels.gpu.matmul_tiles import TILES

    counters = torch.zeros(NUM_COUNTERS, dtype=torch.int32, device="cuda")
    torch.manual_seed(0)
    for (outputs, inputs, is_gated, tokens), tile in TILES.items():
        if tile is None:
            continue
        weight = torch.randn(outputs, inputs, device="cuda").mul_(inputs**-0.5).bfloat16()
        for count in (tokens, tokens - 3):
            x = torch.randn(count, inputs, device="cuda").bfloat16()
            y = matmul(x, weight, tile=tile, activation=2 if is_gated else -1, counters=counters)[0]
            expected = x.float() @ weight.float().T
            expected = gelu_tanh_and_mul(expected) if is_gated else expected
            assert relative(y, expected) < TOLERANCE, (outputs, inputs, is_gated, tokens)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_several_tokens_of_a_plain_product(dtype: torch.dtype) -> None:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    x, weight = draw(40, 256, seed=0).to("cuda", dtype), draw(4096, 256, seed=1).to("cuda", dtype)
    y = fused_linear_op(x, weight, None, 0.0, None, "", None)
    torch.backends.cuda.matmul.allow_tf32 = before
    expected = linear(x.double(), weight.double())
    assert relative(y, expected) < (1e-5 if dtype == torch.float32 else TOLERANCE)
