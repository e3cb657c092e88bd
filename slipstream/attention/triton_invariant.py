"""How does attention run on an NVIDIA GPU with the same bits in every batch? One-token rows as spans of one.

The kernel of spans walks over a row's keys from its first one, in tiles of one size, whatever else the step
holds; keys behind a query add exact zeros. The split kernel of one-token rows cuts a context by how busy the
GPU is, so it is not used. Under a window the walk would start where the tile does, so windows are not served;
nor are trees of drafts, whose tokens lie in other places than the same tokens accepted.
Invariant: what a query gets depends on its row alone, not on the chunk that it came in.
R one-token rows, M tiles of queries.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from slipstream.attention.base import AttentionPlan, AttentionSpec
from slipstream.attention.triton import TILES, TritonAttention
from slipstream.core.batch import ForwardBatch
from slipstream.core.cache_group import CacheGroup
from slipstream.kernels.paged_prefill import paged_prefill_op
from slipstream.kernels.query_tiles import tile_queries


class TritonInvariant(TritonAttention):
    """Paged attention in Triton by one kernel of one shape: full attention, heads of up to 256."""

    capability = dataclasses.replace(
        TritonAttention.capability, window=False, tree=False, cascade=False, batch_invariant=True
    )
    fuses_one_row = False

    def __init__(self) -> None:
        super().__init__()
        # The tiles of steps of one-token rows by their number: made once, captured steps hold their address.
        self._lone_tiles: dict[tuple[int, torch.device], Tensor] = {}

    def describe_kernels(self, groups: Sequence[CacheGroup], *, sm: int, dtype: str) -> list[str]:
        """There is one kernel for all."""
        return []

    def attend(self, q_TNH: Tensor, batch: ForwardBatch, spec: AttentionSpec) -> Tensor:
        """Attend to what already stands in the layer's pages, the step's own tokens included."""
        plan: AttentionPlan = batch.attention_plan
        group, place = batch.layer_place[spec.layer_idx]
        kv_P2tKH, table_BC = batch.kv_pages[group][:, place], batch.block_table[group]
        out_TNH = torch.empty(q_TNH.shape, dtype=q_TNH.dtype, device=q_TNH.device)
        tiles_M2 = self._all_tiles(plan, q_TNH)
        settings = (spec.scale, spec.window, spec.softcap)
        paged_prefill_op(
            q_TNH, kv_P2tKH, table_BC, batch.seq_lens, batch.query_start, tiles_M2, out_TNH, *settings
        )
        return out_TNH

    def _all_tiles(self, plan: AttentionPlan, q_TNH: Tensor) -> Tensor:
        """Return where each tile of queries starts, one-token rows included."""
        device, rows = q_TNH.device, len(plan.query_lens)
        if plan.num_decodes == rows:
            key = (rows, device)
            if key not in self._lone_tiles:
                starts = [(row, 0) for row in range(rows)]
                self._lone_tiles[key] = torch.tensor(starts, dtype=torch.int32, device=device)
            return self._lone_tiles[key]
        tiles_M2 = plan.step_cache.get(TILES)
        if tiles_M2 is None:
            step = tile_queries(q_TNH.dtype)
            starts = [(r, at) for r, count in enumerate(plan.query_lens) for at in range(0, count, step)]
            host = torch.tensor(starts, dtype=torch.int32, pin_memory=q_TNH.is_cuda)
            tiles_M2 = plan.step_cache[TILES] = host.to(device, non_blocking=True)
        return tiles_M2
