"""How do the queries of a step attend to keys and values that stand in pages?

The batch is cut into pieces: several one-token rows at once, or some tokens of one longer span. A piece
gathers the pages it needs, then runs one scaled dot-product attention. What to gather is the same for every
layer of a cache group, so the caller works it out once a step (`attention/torch_reference.py`) and the op
itself takes tensors and integers only.
T tokens, N query heads, H kv heads, G = N / H, D head size, R rows, L gathered positions, P pages, t tokens
of a block. Invariant: a position outside a row's sequence or window never reaches the output, NaN included:
its score is masked, and its K and V are set to zero, because 0 x NaN is NaN.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from slipstream.kernels.registration import register_op

# Integers that describe one piece in `geometry`: its first token, its rows, the tokens of each row, the first
# and last + 1 of the gathered positions to keep, and how many of those stand before the first token's own.
PIECE_INTS = 6


class Scoring(NamedTuple):
    """How scores are formed: `mask` is added to them, `causal` means query i sees the keys 0..i."""

    scale: float
    softcap: float
    mask: Tensor | None = None
    causal: bool = False


def paged_attention(
    q_TND: Tensor,
    kv_P2tHD: Tensor,
    pages: list[Tensor],
    masks: list[Tensor],
    dead: list[Tensor],
    geometry: list[int],
    scale: float,
    window: int,
    softcap: float,
) -> Tensor:
    """Attend piece by piece and return [T, N, D].

    Per piece i: `pages[i]` [R * blocks] are the pages to gather; `masks[i]` [R, 1, 1, L] is added to the
    scores of several one-token rows (empty for a piece of one row); `dead[i]` are the positions of R * L to
    set to zero (may be empty); `geometry[6 * i : 6 * i + 6]` are the integers named at `PIECE_INTS`. Every
    token belongs to one piece. `window` > 0 is the number of positions a query sees, its own included;
    `softcap` > 0 bounds the scores by softcap * tanh(score / softcap).
    """
    out_TND = torch.empty(q_TND.shape, dtype=q_TND.dtype, device=q_TND.device)
    for i, pages_i in enumerate(pages):
        first, rows, tokens, low, high, ahead = geometry[PIECE_INTS * i : PIECE_INTS * (i + 1)]
        k_RLHD = _gather(kv_P2tHD[:, 0], pages_i, dead[i], rows, q_TND.dtype)[:, low:high]
        v_RLHD = _gather(kv_P2tHD[:, 1], pages_i, dead[i], rows, q_TND.dtype)[:, low:high]
        last = first + rows * tokens
        if tokens == 1:
            mask = masks[i].to(q_TND.dtype) if masks[i].numel() else None
            out = _attend_rows(q_TND[first:last], k_RLHD, v_RLHD, Scoring(scale, softcap, mask))
        else:
            scoring = _span_scoring(q_TND, tokens, high - low, ahead, window)._replace(
                scale=scale, softcap=softcap
            )
            out = _attend_span(q_TND[first:last], k_RLHD[0], v_RLHD[0], scoring)
        out_TND[first:last] = out
    return out_TND


def _gather(pool_PtHD: Tensor, pages: Tensor, dead: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    """Copy whole pages into [R, L, H, D] of `dtype` and zero the positions that are not to be seen."""
    gathered = pool_PtHD.index_select(0, pages)
    if dead.numel():
        gathered.view(-1, *gathered.shape[2:]).index_fill_(0, dead, 0.0)
    return gathered.to(dtype).view(rows, -1, *gathered.shape[2:])


def _span_scoring(like: Tensor, tokens: int, length: int, ahead: int, window: int) -> Scoring:
    """Mask of a span: its query i stands at key ahead + i. No tensor where plain causality says it all."""
    is_windowed = 0 < window < length
    if ahead == 0 and length == tokens and not is_windowed:
        return Scoring(1.0, 0.0, causal=True)
    visible = torch.ones((tokens, length), dtype=torch.bool, device=like.device).tril_(ahead)
    if is_windowed:
        visible = visible.triu_(ahead - window + 1)
    mask = torch.zeros((tokens, length), dtype=like.dtype, device=like.device)
    return Scoring(1.0, 0.0, mask.masked_fill_(visible.logical_not_(), float("-inf")))


def _attend_rows(q_RND: Tensor, k_RLHD: Tensor, v_RLHD: Tensor, scoring: Scoring) -> Tensor:
    """Rows of one token: the G query heads of a kv head stand where a span's tokens would."""
    rows, heads, size = q_RND.shape
    q_RHGD = q_RND.reshape(rows, k_RLHD.shape[2], -1, size)
    out_RHGD = _attention(q_RHGD, k_RLHD.transpose(1, 2), v_RLHD.transpose(1, 2), scoring)
    return out_RHGD.reshape(rows, heads, size)


def _attend_span(q_TND: Tensor, k_LHD: Tensor, v_LHD: Tensor, scoring: Scoring) -> Tensor:
    """Tokens of one row: kv heads are the batch, and G query heads read each one through a stride of 0."""
    tokens, heads, size = q_TND.shape
    length, kv_heads, _ = k_LHD.shape
    q_HGTD = q_TND.reshape(tokens, kv_heads, -1, size).permute(1, 2, 0, 3)
    shape = (kv_heads, heads // kv_heads, length, size)
    k_HGLD = k_LHD.transpose(0, 1).unsqueeze(1).expand(shape)
    v_HGLD = v_LHD.transpose(0, 1).unsqueeze(1).expand(shape)
    out_HGTD = _attention(q_HGTD, k_HGLD, v_HGLD, scoring)
    return out_HGTD.permute(2, 0, 1, 3).reshape(tokens, heads, size)


def _attention(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> Tensor:
    scale, softcap, mask, causal = scoring
    # On a GPU torch would choose its memory-efficient kernel, which gave wrong values for one of 32 prompts
    # in float32 (65 tokens, a window; torch 2.11, H100), and right ones with that kernel switched off.
    if softcap == 0.0 and not q.is_cuda:
        return scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale)
    scores = torch.matmul(q, k.transpose(-2, -1)).float().mul_(scale)
    if softcap:
        scores.div_(softcap).tanh_().mul_(softcap)
    if causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu_(1)
        scores.masked_fill_(future, float("-inf"))
    elif mask is not None:
        scores += mask
    return torch.matmul(scores.softmax(-1).to(v.dtype), v)


def _fake(
    q_TND: Tensor,
    kv_P2tHD: Tensor,
    pages: list[Tensor],
    masks: list[Tensor],
    dead: list[Tensor],
    geometry: list[int],
    scale: float,
    window: int,
    softcap: float,
) -> Tensor:
    return torch.empty(q_TND.shape, dtype=q_TND.dtype, device=q_TND.device)


paged_attention_op = register_op(
    "paged_attention(Tensor q_TND, Tensor kv_P2tHD, Tensor[] pages, Tensor[] masks, Tensor[] dead, "
    "int[] geometry, float scale, int window, float softcap) -> Tensor",
    paged_attention,
    _fake,
)
