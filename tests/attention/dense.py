"""What should attention over pages return? Dense attention in float64, and cases to ask it about.

Invariant: a case's pages are NaN wherever no visible token was written: past each length, behind each
window, in pages of nobody; block table entries behind a window and past a length are -1 or stale.
"""

from __future__ import annotations

import dataclasses
import functools
import random

import torch
from torch import Tensor

from slipstream.attention.base import AttentionBackend, AttentionSpec
from slipstream.core.batch import ForwardBatch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One step: row i runs `spans[i][0]` tokens and is `spans[i][1]` long after it; short spans first."""

    spans: tuple[tuple[int, int], ...]
    head_dim: int = 64
    heads: int = 4
    kv_heads: int = 2
    block_tokens: int = 16
    window: int = 0
    softcap: float = 0.0
    kv_dtype: torch.dtype = torch.float32
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    seed: int = 0


def attend_dense(case: Case, q_TNH: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
    """Return [T, N, H] float64: every query against all keys up to its own, with the full score matrix."""
    outputs, first = [], 0
    group = case.heads // case.kv_heads
    for (count, length), k_LKH, v_LKH in zip(case.spans, keys, values, strict=True):
        q = q_TNH[first : first + count].double()
        k = k_LKH.double().repeat_interleave(group, dim=1)
        v = v_LKH.double().repeat_interleave(group, dim=1)
        scores = torch.einsum("tnh,lnh->ntl", q, k) * case.head_dim**-0.5
        if case.softcap:
            scores = case.softcap * torch.tanh(scores / case.softcap)
        key = torch.arange(length, device=q.device)[None, :]
        query = key[0, length - count :, None]
        visible = key <= query
        if case.window:
            visible &= key > query - case.window
        scores = scores.masked_fill(~visible, float("-inf"))
        outputs.append(torch.einsum("ntl,lnh->tnh", scores.softmax(-1), v))
        first += count
    return torch.cat(outputs)


def run_paged(case: Case, backend: AttentionBackend) -> tuple[Tensor, Tensor]:
    """Return the backend's output and the dense one for random inputs of `case`."""
    generator = torch.Generator().manual_seed(case.seed)
    shape = (case.kv_heads, case.head_dim)
    num_tokens = sum(count for count, _ in case.spans)
    q_TNH = torch.randn(num_tokens, case.heads, case.head_dim, generator=generator).to(case.dtype)
    # Rounded to the pages' type first: the cache's rounding is not the kernel's error.
    keys = [torch.randn(n, *shape, generator=generator).to(case.kv_dtype).float() for _, n in case.spans]
    values = [torch.randn(n, *shape, generator=generator).to(case.kv_dtype).float() for _, n in case.spans]
    batch, place = make_batch(case, backend, keys, values)
    new_k = torch.cat([k[n - count :] for k, (count, n) in zip(keys, case.spans, strict=True)])
    new_v = torch.cat([v[n - count :] for v, (count, n) in zip(values, case.spans, strict=True)])
    spec = AttentionSpec(
        layer_idx=place,
        scale=case.head_dim**-0.5,
        num_kv_heads=case.kv_heads,
        head_dim=case.head_dim,
        window=case.window,
        softcap=case.softcap,
    )
    new = (x.to(case.device, case.dtype) for x in (q_TNH, new_k, new_v))
    given = batch.attention_plan.run(*new, batch, spec)
    if case.device != "cpu":
        q_TNH = q_TNH.to(case.device)
        keys, values = ([x.to(case.device) for x in side] for side in (keys, values))
    return given, attend_dense(case, q_TNH, keys, values)


def make_batch(
    case: Case, backend: AttentionBackend, keys: list[Tensor], values: list[Tensor]
) -> tuple[ForwardBatch, int]:
    """Lay the earlier tokens of every row into pages shared by two layers; return the batch and the layer."""
    t, rng = case.block_tokens, random.Random(case.seed)
    widths = [-(-length // t) for _, length in case.spans]
    num_pages = sum(widths) + 3
    free = list(range(num_pages))
    rng.shuffle(free)
    layer = 1
    kv_pages = torch.full(
        (num_pages, 2, 2, t, case.kv_heads, case.head_dim), float("nan"), dtype=case.kv_dtype
    )
    table = torch.full((len(widths), max(widths) + 1), -1, dtype=torch.int32)
    slots, positions, row_of = [], [], []
    for row, (count, length) in enumerate(case.spans):
        start = length - count
        seen = max(0, start - case.window + 1) if case.window else 0
        for block in range(seen // t, widths[row]):
            table[row, block] = free.pop()
        # Behind the window an entry may still name a page that now belongs to somebody else.
        if seen // t > 1:
            table[row, 0] = int(table[row, widths[row] - 1])
        for position in range(seen, start):
            page = table[row, position // t]
            kv_pages[page, layer, 0, position % t] = keys[row][position].to(case.kv_dtype)
            kv_pages[page, layer, 1, position % t] = values[row][position].to(case.kv_dtype)
        span = range(start, length)
        positions += span
        row_of += [row] * count
        slots += [int(table[row, p // t]) * t + p % t for p in span]
    lens = [length for _, length in case.spans]
    query_lens = [count for count, _ in case.spans]
    on_device = functools.partial(torch.tensor, device=case.device)
    batch = ForwardBatch(
        token_ids_T=on_device([0] * len(slots)),
        positions_kT=on_device([positions]),
        row_of_T=on_device(row_of),
        query_start=on_device([0, *torch.tensor(query_lens).cumsum(0).tolist()]),
        seq_lens=on_device(lens, dtype=torch.int32),
        slot_mapping_T=[on_device(slots)],
        block_table=[table.to(case.device)],
        kv_pages=[kv_pages.to(case.device)],
        layer_place=[(0, 0), (0, layer)],
        # The plan may only know upper bounds.
        attention_plan=backend.plan(query_lens=query_lens, max_seq_lens=[n + 3 for n in lens]),
        logits_idx=on_device([], dtype=torch.int64),
    )
    return batch, layer
