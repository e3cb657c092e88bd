"""Do the kernels of `batch_invariant=True` compute what they should, in bits that depend on a row alone?

Bits are a GPU's business: numpy, in which triton interprets, adds up the lines of a tile in several ways, so
there the same places are compared up to rounding.
"""

from __future__ import annotations

import pytest
import torch

from slipstream.attention import triton_invariant as backend_file
from slipstream.attention.triton_invariant import TritonInvariant
from slipstream.core.batch import ForwardBatch
from tests.attention.dense import Case, run_paged
from tests.kernels.gpu.conftest import HAS_GPU, has_interpreter

if HAS_GPU or has_interpreter():
    from slipstream.kernels.gpu.fixed_matmul import fixed_matmul

DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if HAS_GPU else [])
# Half a unit of the result, beside the rounding of long sums in float32.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
DECODES = ((1, 1), (1, 2), (1, 17), (1, 64), (1, 129), (1, 33))
MIXED = ((1, 5), (1, 130), (2, 2), (7, 40), (40, 40), (70, 111))


@pytest.fixture(autouse=True)
def kernels_instead_of_definitions(monkeypatch: pytest.MonkeyPatch) -> None:
    if HAS_GPU:
        return
    from slipstream.kernels.gpu.paged_prefill import paged_prefill

    monkeypatch.setattr(backend_file, "paged_prefill_op", paged_prefill)


def assert_same(given: torch.Tensor, expected: torch.Tensor) -> None:
    bound = 0.0 if HAS_GPU else TOLERANCE[expected.dtype]
    torch.testing.assert_close(given, expected, rtol=bound, atol=bound)


def draw(*shape: int, dtype: torch.dtype, device: str, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 64), (100, 70), (576, 200)])
def test_a_product_is_the_same_bits_at_any_number_of_tokens(
    device: str, inputs: int, outputs: int, dtype: torch.dtype
) -> None:
    x = draw(131, inputs, dtype=dtype, device=device)
    weight = (draw(outputs, inputs, dtype=torch.float32, device=device, seed=1) * inputs**-0.5).to(dtype)
    whole = fixed_matmul(x, weight)
    expected = (x.double() @ weight.double().T).to(dtype)
    torch.testing.assert_close(whole, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    for first, last in ((0, 1), (70, 71), (3, 20), (60, 131)):
        assert_same(fixed_matmul(x[first:last], weight), whole[first:last])
    apart = draw(131, 2 * inputs, dtype=dtype, device=device, seed=2)[:, :inputs]
    assert_same(fixed_matmul(apart, weight), fixed_matmul(apart.contiguous(), weight))
    assert fixed_matmul(x[:0], weight).shape == (0, outputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("inputs", [2048, 2080, 5000])
def test_who_adds_up_the_parts_changes_nothing(device: str, inputs: int, dtype: torch.dtype) -> None:
    x = draw(67, inputs, dtype=dtype, device=device)
    weight = (draw(66, inputs, dtype=torch.float32, device=device, seed=1) * inputs**-0.5).to(dtype)
    one, many = (fixed_matmul(x, weight, is_split=is_split) for is_split in (False, True))
    assert_same(many, one)
    expected = (x.double() @ weight.double().T).to(dtype)
    torch.testing.assert_close(one, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert_same(fixed_matmul(x[5:6], weight), one[5:6])


@pytest.mark.parametrize("spans", [DECODES, MIXED], ids=["decodes", "mixed"])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 1, 64), (2, 2, 80)])
def test_attention_is_attention(device: str, heads: int, kv_heads: int, head_dim: int, spans: tuple) -> None:
    for dtype in DTYPES:
        case = Case(
            device=device, spans=spans, heads=heads, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype,
            kv_dtype=dtype,
        )  # fmt: skip
        given, expected = run_paged(case, TritonInvariant())
        assert float((given.double() - expected).abs().max()) <= TOLERANCE[dtype]


def attend(
    backend: TritonInvariant, kv: torch.Tensor, q: torch.Tensor, rows: list[tuple[int, int]]
) -> torch.Tensor:
    """Attend with the queries of (length, sequence length) rows, the last of `q`'s sequence each."""
    query_lens, seq_lens = [n for n, _ in rows], [length for _, length in rows]
    tokens = torch.cat([q[length - n : length] for n, length in rows])
    device = q.device
    blocks = kv.shape[0]
    start = torch.tensor([0, *query_lens], device=device).cumsum(0)
    batch = ForwardBatch(
        token_ids_T=torch.zeros(len(tokens), dtype=torch.int64, device=device),
        positions_kT=torch.zeros(1, len(tokens), dtype=torch.int64, device=device),
        row_of_T=torch.zeros(len(tokens), dtype=torch.int64, device=device),
        query_start=start,
        seq_lens=torch.tensor(seq_lens, device=device),
        slot_mapping_T=[],
        block_table=[torch.arange(blocks, dtype=torch.int32, device=device).repeat(len(rows), 1)],
        kv_pages=[kv[:, None]],
        layer_place=[(0, 0)],
        attention_plan=backend.plan(query_lens=query_lens, max_seq_lens=seq_lens),
        logits_idx=start[1:] - 1,
    )
    from slipstream.attention.base import AttentionSpec

    spec = AttentionSpec(layer_idx=0, scale=0.125, num_kv_heads=kv.shape[3], head_dim=kv.shape[4])
    return backend.attend(tokens, batch, spec)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_query_has_the_same_bits_in_every_chunk(device: str, dtype: torch.dtype) -> None:
    length, page_tokens = 150, 16
    kv = draw(-(-length // page_tokens), 2, page_tokens, 2, 64, dtype=dtype, device=device)
    q = draw(length, 4, 64, dtype=dtype, device=device, seed=1)
    backend = TritonInvariant()
    whole = attend(backend, kv, q, [(length, length)])
    for chunks in ([(70, 70), (80, 150)], [(1, 1), (2, 3), (33, 36), (114, 150)]):
        parts = [attend(backend, kv, q, [chunk]) for chunk in chunks]
        assert_same(torch.cat(parts), whole)
    ones = [1, 65, 100, 150]
    alone = attend(backend, kv, q, [(1, n) for n in ones])
    assert_same(alone, whole[[n - 1 for n in ones]])
    mixed = attend(backend, kv, q, [(1, 100), (20, 150)])
    assert_same(mixed, torch.cat([whole[99:100], whole[130:150]]))
