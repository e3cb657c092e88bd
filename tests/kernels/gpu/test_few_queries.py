"""Do few queries behind a long context, whose keys are shared out, get what dense attention in float64 gives?

Shares are made small here, so that a few hundred keys make several; on a GPU real shapes run as well.
"""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from slipstream.kernels.paged_decode import NUM_COUNTERS
from slipstream.kernels.paged_prefill import paged_prefill_op
from slipstream.kernels.query_tiles import tile_queries
from tests.kernels.gpu.conftest import HAS_GPU, has_interpreter

if HAS_GPU or has_interpreter():
    from slipstream.kernels.gpu import paged_prefill as file

# As in `test_paged_attention.py`.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
PAGE = 16
# Rows of one token that no tile names, a span of its own, chunks behind contexts; (queries, length).
SPANS = ((1, 9), (2, 2), (7, 130), (40, 101))


@dataclasses.dataclass
class Step:
    """Inputs of one step; pages are NaN wherever no query may look."""

    spans: tuple[tuple[int, int], ...]
    heads: int
    kv_heads: int
    size: int
    window: int = 0
    softcap: float = 0.0
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    width: int = 0
    padding: int = 0

    def __post_init__(self) -> None:
        draw = torch.Generator().manual_seed(7)
        tokens = sum(count for count, _ in self.spans)
        q = torch.randn(tokens, self.heads, self.size, generator=draw).to(self.dtype)
        self.q = torch.cat((q, torch.full((self.padding, *q.shape[1:]), math.nan, dtype=self.dtype)))
        widths = [-(-length // PAGE) for _, length in self.spans]
        self.pages = torch.full((sum(widths) + 2, 2, PAGE, self.kv_heads, self.size), math.nan)
        self.table = torch.full((len(widths), max(self.width, *widths)), -1, dtype=torch.int32)
        order = iter((torch.randperm(sum(widths), generator=draw) + 1).tolist())
        self.kv: list[Tensor] = []
        for row, (count, length) in enumerate(self.spans):
            kv = torch.randn(2, length, self.kv_heads, self.size, generator=draw).to(self.dtype).float()
            seen = max(0, length - count - self.window + 1) if self.window else 0
            for block in range(seen // PAGE, widths[row]):
                page = self.table[row, block] = next(order)
                low, high = max(seen, block * PAGE), min(length, (block + 1) * PAGE)
                self.pages[page, :, low - block * PAGE : high - block * PAGE] = kv[:, low:high]
            self.kv.append(kv)
        self.pages = self.pages.to(self.dtype)
        self.counters = torch.zeros(NUM_COUNTERS, dtype=torch.int32, device=self.device)

    def run(self, cut: object = None, *, is_cut: bool = True, tile_bound: int = 0) -> Tensor:
        """Return the kernel's output; rows that no tile names stay NaN."""
        counts = [count for count, _ in self.spans]
        step = tile_queries(self.dtype)
        spans = [(row, max(count, tile_bound)) for row, count in enumerate(counts) if count > 1]
        tiles = [(row, at) for row, count in spans for at in reversed(range(0, count, step))]
        out = torch.full_like(self.q, math.nan, device=self.device)
        file.paged_prefill(
            self.q.to(self.device),
            self.pages.to(self.device),
            self.table.to(self.device),
            torch.tensor([length for _, length in self.spans], device=self.device),
            torch.tensor([0, *counts], device=self.device).cumsum(0),
            torch.tensor(tiles, dtype=torch.int32, device=self.device),
            out,
            self.size**-0.5,
            self.window,
            self.softcap,
            self.counters if is_cut else None,
            cut=cut,  # type: ignore[arg-type]
        )
        return out

    def expected(self) -> Tensor:
        """Return [T, N, H] in float64, NaN for one-token rows and padding."""
        out, first = torch.full(self.q.shape, math.nan, dtype=torch.float64, device=self.device), 0
        for (count, length), kv in zip(self.spans, self.kv, strict=True):
            q = self.q[first : first + count].to(self.device).double()
            k, v = kv.to(self.device).double().repeat_interleave(self.heads // self.kv_heads, dim=2)
            scores = torch.einsum("tnh,lnh->ntl", q, k) * self.size**-0.5
            if self.softcap:
                scores = self.softcap * torch.tanh(scores / self.softcap)
            key = torch.arange(length, device=self.device)
            query = key[length - count :, None]
            visible = key <= query
            if self.window:
                visible &= key > query - self.window
            weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
            if count > 1:
                out[first : first + count] = torch.einsum("ntl,lnh->tnh", weights, v)
            first += count
        return out


def small_cut(**changes: int) -> object:
    return file.Cut(
        **{"lines": 32, "keys": 32, "warps": 4, "stages": 2, "per_sm": 400, "shortest": 32} | changes
    )


def check(step: Step, cut: object) -> None:
    given = step.run(cut).double()
    torch.testing.assert_close(given, step.expected(), rtol=0, atol=TOLERANCE[step.dtype], equal_nan=True)
    assert not step.counters.any()


@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "spans"),
    [
        (4, 1, 64, SPANS),
        (2, 2, 80, SPANS),
        (6, 2, 32, SPANS),
        (9, 1, 16, SPANS[2:3]),
        (32, 1, 16, SPANS[2:3]),
    ],
)
def test_head_shapes(device: str, heads: int, kv_heads: int, size: int, spans: tuple) -> None:
    check(Step(spans, heads, kv_heads, size, device=device), small_cut())


@pytest.mark.parametrize(("window", "softcap"), [(0, 3.0), (1, 0.0), (7, 3.0), (40, 0.0), (99, 0.0)])
def test_windows_and_soft_caps(device: str, window: int, softcap: float) -> None:
    check(Step(SPANS, 2, 1, 32, window=window, softcap=softcap, device=device), small_cut())


@pytest.mark.parametrize("dtype", [torch.float16] + ([torch.bfloat16] if HAS_GPU else []))
@pytest.mark.parametrize("changes", [{}, {"lines": 64, "keys": 64}, {"lines": 128, "warps": 8}], ids=str)
def test_narrow_types_and_tiles(device: str, dtype: torch.dtype, changes: dict[str, int]) -> None:
    check(Step(SPANS, 4, 2, 64, dtype=dtype, device=device), small_cut(**changes))


def test_a_wider_table_and_padding_change_no_bit(device: str) -> None:
    """What a captured step differs in: the bound of a row's length, tokens and tiles behind the span."""
    spans = ((40, 200),)
    exact = Step(spans, 4, 1, 32, device=device)
    padded = Step(spans, 4, 1, 32, device=device, width=60, padding=24)
    cut = small_cut(shortest=64)
    given, again = exact.run(cut), padded.run(cut, tile_bound=64)
    assert torch.equal(given[:40], again[:40]) and bool(again[40:].isnan().all())
    assert not torch.equal(given, exact.run(cut, is_cut=False)), "nothing was shared out"
    assert not padded.counters.any()


def test_an_empty_row_does_nothing(device: str) -> None:
    """A captured step is captured for nobody: no queries, no keys."""
    step = Step(((2, 300),), 4, 1, 32, device=device, padding=14)
    out = torch.full_like(step.q, math.nan, device=device)
    none = torch.zeros(1, device=device, dtype=torch.int64)
    start, tiles = torch.zeros(2, device=device, dtype=torch.int64), torch.zeros(1, 2, dtype=torch.int32)
    pages, table = step.pages.to(device), step.table.to(device)
    file.paged_prefill(
        step.q.to(device), pages, table, none, start, tiles.to(device), out, 0.1, 0, 0.0, step.counters,
        cut=small_cut(),  # type: ignore[arg-type]
    )  # fmt: skip
    assert bool(out.isnan().all()) and not step.counters.any()


def test_how_many_shares() -> None:
    cut = file.CUT
    # 64 queries of 32 and 8 heads, 4,160 keys: 4 programs a kv head, 2 programs a multiprocessor.
    assert file.choose_shares(32, 4160, cut, sms=132) == (8, 8)
    assert file.choose_shares(32, 100, cut, sms=132) == (8, 1)
    assert file.choose_shares(1, 10**6, cut, sms=132) == (file.MAX_SHARES, file.MAX_SHARES)
    assert file.choose_shares(1000, 10**6, cut, sms=132) == (1, 1)


@pytest.mark.skipif(not HAS_GPU, reason="needs a GPU: interpreted, it takes minutes")
@pytest.mark.parametrize("spans", [((64, 4160),), ((17, 8192),), ((256, 12000),), ((2, 5000), (130, 9000))])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "size"), [(32, 8, 128), (16, 8, 128), (4, 1, 256), (64, 8, 64)]
)
def test_real_shapes(device: str, spans: tuple, heads: int, kv_heads: int, size: int) -> None:
    step = Step(spans, heads, kv_heads, size, dtype=torch.bfloat16, device=device)
    check(step, None)
    assert torch.equal(step.run(), step.run())


def test_the_op_declares_its_counters() -> None:
    step = Step(((2, 20),), 2, 1, 16)
    tail = (torch.tensor([20]), torch.tensor([0, 2]), torch.zeros(1, 2, dtype=torch.int32))
    arguments = (step.q, step.pages, step.table, *tail, torch.empty_like(step.q), 0.25, 0, 0.0, step.counters)
    torch.library.opcheck(paged_prefill_op, arguments, test_utils=("test_schema", "test_faketensor"))
