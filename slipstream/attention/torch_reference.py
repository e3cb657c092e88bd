"""How does attention run with plain torch, on any device? The definition other backends are checked against.

A step becomes pieces (`kernels/paged_attention.py`): one-token rows together, a few megabytes of keys at a
time so that what was gathered is still in a cache when it is read, and long spans in runs of queries, each
with only the pages it can see. Tokens of a tree of drafts run as rows of one token over the same pages. The
pieces depend on the step and the group, not on the layer, so the first layer of a group works them out and
the plan keeps them.
Invariant: what is gathered, and what is masked, follows `seq_lens` itself, not the plan's bounds. On a GPU
reading it waits for the device, once a step: this backend is the reference there, not the fast path.
T tokens, N query heads, K kv heads, H head size, B rows, R rows of a piece, C blocks of a row, L positions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from slipstream.attention.base import AttentionCapability, AttentionPlan, AttentionSpec
from slipstream.core.batch import ForwardBatch
from slipstream.kernels.paged_attention import paged_attention_op
from slipstream.kernels.store_kv import store_kv
from slipstream.kernels.tree_masks import visible_positions

# Keys of one-token rows gathered at once; about a core's share of the last-level cache.
MAX_GATHER_BYTES = 2 << 20
# Queries of a span that run at once; bounds the score matrix a kernel without tiling would make.
MAX_SPAN_QUERIES = 512


@dataclasses.dataclass(slots=True)
class Pieces:
    """Arguments of the paged attention op that all layers of a group share."""

    pages: list[Tensor] = dataclasses.field(default_factory=list)
    masks: list[Tensor] = dataclasses.field(default_factory=list)
    dead: list[Tensor] = dataclasses.field(default_factory=list)
    geometry: list[int] = dataclasses.field(default_factory=list)

    def add(self, geometry: Sequence[int], pages: Tensor, mask: Tensor, dead: Tensor) -> None:
        self.pages.append(pages)
        self.masks.append(mask)
        self.dead.append(dead)
        self.geometry.extend(geometry)


class TorchReference:
    """Gather pages, mask, scaled dot-product attention. Any head size, page size, window and soft cap."""

    capability = AttentionCapability(window=True, tree=True)

    def plan(self, *, query_lens: Sequence[int], max_seq_lens: Sequence[int]) -> AttentionPlan:
        return AttentionPlan.create(self, query_lens, max_seq_lens)

    def run(
        self, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, batch: ForwardBatch, spec: AttentionSpec
    ) -> Tensor:
        """Store K and V, then attend. Waits for the device once a step and group where that is a GPU."""
        plan: AttentionPlan = batch.attention_plan
        group, place = batch.layer_place[spec.layer_idx]
        kv_P2tKH = batch.kv_pages[group][:, place]
        block_tokens = kv_P2tKH.shape[2]
        slots = plan.step_cache.get(group)
        if slots is None:
            slot_T = batch.slot_mapping_T[group].long()
            slots = plan.step_cache[group] = (slot_T // block_tokens, slot_T % block_tokens)
        store_kv(k_TKH, v_TKH, kv_P2tKH, *slots)
        pieces = plan.step_cache.get((group, spec.window))
        if pieces is None:
            page_bytes = kv_P2tKH[0, 0].numel() * kv_P2tKH.element_size()
            rows_at_once = max(1, MAX_GATHER_BYTES // page_bytes)
            pieces = cut_pieces(plan, batch, group, block_tokens, spec.window, rows_at_once)
            plan.step_cache[(group, spec.window)] = pieces
        return paged_attention_op(
            q_TNH,
            kv_P2tKH,
            pieces.pages,
            pieces.masks,
            pieces.dead,
            pieces.geometry,
            spec.scale,
            spec.window,
            spec.softcap,
        )


def cut_pieces(
    plan: AttentionPlan, batch: ForwardBatch, group: int, block_tokens: int, window: int, max_blocks: int
) -> Pieces:
    """Cut the step into pieces; a piece of one-token rows gathers at most `max_blocks` blocks, or one row."""
    pieces = Pieces()
    seq_lens: list[int] = batch.seq_lens.tolist()
    table_BC = batch.block_table[group].long()
    decode_lens = seq_lens[: plan.num_decodes]
    for first, last in group_rows(decode_lens, block_tokens, window, max_blocks):
        if last - first == 1:
            _add_run(pieces, table_BC[first], first, 1, seq_lens[first] - 1, block_tokens, window)
        else:
            _add_rows(pieces, table_BC, first, decode_lens[first:last], block_tokens, window)
    token = plan.num_decodes
    for row in range(plan.num_decodes, len(plan.query_lens)):
        query_len = plan.query_lens[row]
        start = seq_lens[row] - query_len
        if plan.tree_T is not None and int(plan.tree_T[token]):
            tree_T = plan.tree_T[token : token + query_len]
            _add_tree(pieces, table_BC[row], token, start, tree_T, block_tokens, window, max_blocks)
            token += query_len
            continue
        for offset in range(0, query_len, MAX_SPAN_QUERIES):
            count = min(MAX_SPAN_QUERIES, query_len - offset)
            _add_run(pieces, table_BC[row], token + offset, count, start + offset, block_tokens, window)
        token += query_len
    return pieces


def group_rows(
    seq_lens: Sequence[int], block_tokens: int, window: int, max_blocks: int
) -> Iterator[tuple[int, int]]:
    """Yield [first, last) of consecutive one-token rows whose padded gather stays within `max_blocks`."""
    first, widest = 0, 0
    for row, length in enumerate(seq_lens):
        start = _first_seen(length - 1, window) // block_tokens
        blocks = (length - 1) // block_tokens - start + 1
        if row > first and max(widest, blocks) * (row - first + 1) > max_blocks:
            yield first, row
            first, widest = row, 0
        widest = max(widest, blocks)
    if len(seq_lens) > first:
        yield first, len(seq_lens)


def _first_seen(position: int, window: int) -> int:
    return max(0, position - window + 1) if window else 0


def _add_run(
    pieces: Pieces,
    table_C: Tensor,
    first_token: int,
    count: int,
    position: int,
    block_tokens: int,
    window: int,
) -> None:
    """Add `count` tokens of a row from `position` on. The gather is cut to what is seen: nothing to zero."""
    seen = _first_seen(position, window)
    block = seen // block_tokens
    last_block = (position + count - 1) // block_tokens
    low = seen - block * block_tokens
    high = position + count - block * block_tokens
    nothing = table_C.new_empty(0)
    geometry = (first_token, 1, count, low, high, position - seen)
    pieces.add(geometry, table_C[block : last_block + 1], nothing, nothing)


def _add_tree(
    pieces: Pieces,
    table_C: Tensor,
    first_token: int,
    start: int,
    tree_T: Tensor,
    block_tokens: int,
    window: int,
    max_blocks: int,
) -> None:
    """Add a tree's tokens, a few at once. What one does not see is zeroed in its own copy: NaN stays away."""
    seen, length = _first_seen(start, window), start + len(tree_T)
    block, num_blocks = seen // block_tokens, -(-length // block_tokens)
    visible_TL = visible_positions(tree_T, first=seen, length=length, window=window)
    margins = (seen - block * block_tokens, num_blocks * block_tokens - length)
    is_dead_TL = torch.nn.functional.pad(visible_TL.logical_not(), margins, value=True)
    mask_TL = torch.zeros(is_dead_TL.shape, device=table_C.device).masked_fill_(is_dead_TL, float("-inf"))
    at_once = max(1, max_blocks // (num_blocks - block))
    for at in range(0, len(tree_T), at_once):
        is_dead, mask = is_dead_TL[at : at + at_once], mask_TL[at : at + at_once]
        geometry = (first_token + at, len(mask), 1, 0, mask.shape[1], 0)
        pages = table_C[block:num_blocks].repeat(len(mask))
        pieces.add(geometry, pages, mask[:, None, None, :], is_dead.flatten().nonzero().squeeze(1))


def _add_rows(
    pieces: Pieces, table_BC: Tensor, first: int, seq_lens: list[int], block_tokens: int, window: int
) -> None:
    """Add one-token rows, padded to the widest. What nobody may read is gathered from page 0 and zeroed."""
    rows = len(seq_lens)
    len_R1 = torch.tensor(seq_lens, device=table_BC.device).unsqueeze(1)
    seen_R1 = (len_R1 - window).clamp_(min=0) if window else torch.zeros_like(len_R1)
    block_R1 = seen_R1 // block_tokens
    num_blocks = int((((len_R1 - 1) // block_tokens) - block_R1).max()) + 1
    block_RC = block_R1 + torch.arange(num_blocks, device=table_BC.device)
    is_live_RC = block_RC * block_tokens < len_R1
    page_RC = table_BC[first : first + rows].gather(1, block_RC.clamp(max=table_BC.shape[1] - 1))
    page_RC = torch.where(is_live_RC, page_RC, 0)
    offset_t = torch.arange(block_tokens, device=table_BC.device)
    position_RL = (block_RC.unsqueeze(2) * block_tokens + offset_t).flatten(1)
    is_dead_RL = (position_RL >= len_R1) | (position_RL < seen_R1)
    mask_RL = torch.zeros(is_dead_RL.shape, device=table_BC.device).masked_fill_(is_dead_RL, float("-inf"))
    geometry = (first, rows, 1, 0, num_blocks * block_tokens, 0)
    dead = is_dead_RL.flatten().nonzero().squeeze(1)
    pieces.add(geometry, page_RC.flatten(), mask_RL[:, None, None, :], dead)
