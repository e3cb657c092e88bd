"""How does attention run on an NVIDIA GPU? One-token rows and longer spans, each by a kernel of its own.

One-token rows split their contexts evenly over the whole GPU; spans run in tiles of queries. Both read the
pages in place, through the block table. What the kernels need of the plan is made once a step: where tiles
start follows from host bounds, and where the rows' work is cut from the lengths, on the device.
Where rows begin with the same pages and the plan says so, these are read once for all of them.
Invariant: nothing here waits for the device or depends on its values, so that a step of one-token rows may be
captured and replayed for other lengths.
T tokens, N query heads, K kv heads, H head size, B rows, R one-token rows, M tiles of queries.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from slipstream.attention.base import AttentionCapability, AttentionPlan, AttentionSpec, Rotation
from slipstream.core.batch import ForwardBatch
from slipstream.core.cache_group import CacheGroup
from slipstream.kernels.balanced_decode import balanced_decode_op
from slipstream.kernels.decode_borders import decode_borders_op
from slipstream.kernels.decode_shares import keys_of_unit, num_programs
from slipstream.kernels.paged_decode import NUM_COUNTERS, paged_decode_op
from slipstream.kernels.paged_prefill import paged_prefill_op
from slipstream.kernels.plugins import KERNELS
from slipstream.kernels.prompt_kernels import describe_prompt_kernel
from slipstream.kernels.query_tiles import tile_queries
from slipstream.kernels.rotary_decode import rotary_decode_op
from slipstream.kernels.rotary_store import rotary_store_op
from slipstream.kernels.shared_prefix import SharedPrefixes
from slipstream.kernels.shared_prefix_decode import shared_prefix_decode_op
from slipstream.kernels.store_slots import store_slots_op

MAX_HEAD_DIM = 256
MIN_SM = 80
TILES = "tiles"
BORDERS = "borders"
PAGED_DECODE = "paged_decode"
# The ops that one kernel does together for one row, unless an outside kernel is to do one of them.
PARTS_OF_ONE = frozenset({"rotary_store", PAGED_DECODE})


class TritonAttention:
    """Paged attention in Triton: any page size, window and soft cap, heads of up to 256."""

    capability = AttentionCapability(
        devices=frozenset({"cuda"}),
        min_sm=MIN_SM,
        head_dims=frozenset(range(8, MAX_HEAD_DIM + 1, 8)),
        window=True,
        tree=True,
        cascade=True,
        graph=True,
        needs_triton=True,
        rotates=True,
    )
    # A lone row's rotation, cache write and attention are one kernel, with a split of its own.
    fuses_one_row = True

    def __init__(self) -> None:
        self._counters: Tensor | None = None

    def describe_kernels(self, groups: Sequence[CacheGroup], *, sm: int, dtype: str) -> list[str]:
        """Return a sentence for each choice between kernels, for an engine's report."""
        shapes = sorted({(group.head_dim, group.block_tokens) for group in groups})
        facts = {"sm": sm, "dtype": dtype}
        return [describe_prompt_kernel(**facts, head_dim=h, block_tokens=t) for h, t in shapes]

    def plan(self, *, query_lens: Sequence[int], max_seq_lens: Sequence[int]) -> AttentionPlan:
        return AttentionPlan.create(self, query_lens, max_seq_lens)

    def run(
        self, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, batch: ForwardBatch, spec: AttentionSpec
    ) -> Tensor:
        """Store K and V, then attend. Only enqueues."""
        group, place = batch.layer_place[spec.layer_idx]
        kv_P2tKH = batch.kv_pages[group][:, place]
        store_slots_op(k_TKH, v_TKH, kv_P2tKH, batch.slot_mapping_T[group])
        return self.attend(q_TNH, batch, spec)

    def rotate_and_run(
        self, qkv_TC: Tensor, rotation: Rotation, batch: ForwardBatch, spec: AttentionSpec
    ) -> Tensor:
        """Norm and turn q and k, store k and v, attend, and return [T, N * H]. Only enqueues."""
        group, place = batch.layer_place[spec.layer_idx]
        is_one = self.fuses_one_row and batch.attention_plan.query_lens == (1,)
        if is_one and PARTS_OF_ONE.isdisjoint(KERNELS.on_gpu):
            return self._run_one(qkv_TC, rotation, batch, spec)
        q_TNH = rotary_store_op(
            qkv_TC,
            rotation.table_P2H,
            batch.positions_kT[0],
            rotation.q_norm_H,
            rotation.k_norm_H,
            rotation.eps,
            rotation.interleaved,
            rotation.heads,
            batch.kv_pages[group][:, place],
            batch.slot_mapping_T[group],
        )
        return self.attend(q_TNH, batch, spec).flatten(1)

    def _run_one(
        self, qkv_1C: Tensor, rotation: Rotation, batch: ForwardBatch, spec: AttentionSpec
    ) -> Tensor:
        """Do all of it in one kernel for a step of one row, which reads nothing that another row writes."""
        group, place = batch.layer_place[spec.layer_idx]
        out_1NH = rotary_decode_op(
            qkv_1C,
            rotation.table_P2H,
            batch.positions_kT[0],
            rotation.q_norm_H,
            rotation.k_norm_H,
            rotation.eps,
            rotation.interleaved,
            rotation.heads,
            batch.kv_pages[group][:, place],
            batch.slot_mapping_T[group],
            batch.block_table[group],
            batch.seq_lens,
            self._zeros(qkv_1C.device),
            batch.attention_plan.max_seq_len,
            spec.scale,
            spec.window,
            spec.softcap,
        )
        return out_1NH.flatten(1)

    def attend(self, q_TNH: Tensor, batch: ForwardBatch, spec: AttentionSpec) -> Tensor:
        """Attend to what already stands in the layer's pages, the step's own tokens included."""
        plan: AttentionPlan = batch.attention_plan
        group, place = batch.layer_place[spec.layer_idx]
        kv_P2tKH, table_BC = batch.kv_pages[group][:, place], batch.block_table[group]
        out_TNH = torch.empty(q_TNH.shape, dtype=q_TNH.dtype, device=q_TNH.device)
        settings = (spec.scale, spec.window, spec.softcap)
        rows = plan.num_decodes
        if rows:
            cache = (kv_P2tKH, table_BC, batch.seq_lens[:rows])
            self._attend_rows(q_TNH[:rows], cache, out_TNH[:rows], plan, settings)
        if rows < len(plan.query_lens):
            where = (batch.seq_lens, batch.query_start, self._tiles(plan, q_TNH))
            # A kernel from outside need not know of trees to serve steps without.
            trees = () if plan.tree_T is None else (plan.tree_T,)
            counters = self._zeros(q_TNH.device)
            paged_prefill_op(q_TNH, kv_P2tKH, table_BC, *where, out_TNH, *settings, counters, *trees)
        return out_TNH

    def _attend_rows(
        self,
        q_RNH: Tensor,
        cache: tuple[Tensor, Tensor, Tensor],
        out_RNH: Tensor,
        plan: AttentionPlan,
        settings: tuple[float, int, float],
    ) -> None:
        """Attend for the rows of one token: one alone in shares of its context, several in shares of all."""
        counters, rows = self._zeros(q_RNH.device), len(q_RNH)
        if rows == 1 or PAGED_DECODE in KERNELS.on_gpu:
            longest = max(plan.max_seq_lens[:rows])
            paged_decode_op(q_RNH, *cache, out_RNH, counters, longest, *settings)
            return
        scale, window, softcap = settings
        # Behind a window rows see other positions of what they share.
        shared = None if window else plan.shared
        borders = self._borders(q_RNH, cache, plan, window, shared)
        if shared is None:
            balanced_decode_op(q_RNH, *cache, borders, out_RNH, counters, *settings)
        else:
            shared_prefix_decode_op(q_RNH, *cache, borders, *shared, out_RNH, counters, scale, softcap)

    def _borders(
        self,
        q_RNH: Tensor,
        cache: tuple[Tensor, Tensor, Tensor],
        plan: AttentionPlan,
        window: int,
        shared: SharedPrefixes | None,
    ) -> Tensor:
        """Return where the work of the rows is cut: made once a step for layers that see as far."""
        kv_P2tKH, _, lens_R = cache
        kv_heads, size = kv_P2tKH.shape[3:]
        cut = (kv_heads, keys_of_unit(q_RNH.dtype, size), window)
        borders = plan.step_cache.get((BORDERS, *cut))
        if borders is None:
            shared_R = None if shared is None else shared.rows_5R[0]
            borders = decode_borders_op(lens_R, shared_R, *cut, num_programs(q_RNH.device))
            plan.step_cache[(BORDERS, *cut)] = borders
        return borders

    def _zeros(self, device: torch.device) -> Tensor:
        """Return the counters of the decode kernel: made once, for captured steps hold their address."""
        if self._counters is None or self._counters.device != device:
            self._counters = torch.zeros(NUM_COUNTERS, dtype=torch.int32, device=device)
        return self._counters

    def _tiles(self, plan: AttentionPlan, q_TNH: Tensor) -> Tensor:
        """Return where each tile of queries starts, (row, first query of the row), made once a step."""
        tiles_M2 = plan.step_cache.get(TILES)
        if tiles_M2 is None:
            step = tile_queries(q_TNH.dtype)
            numbered = enumerate(plan.query_lens[plan.num_decodes :], start=plan.num_decodes)
            # Late tiles of a row see the most keys: first, so that no long one is left over at the end.
            starts = [(row, at) for row, count in numbered for at in reversed(range(0, count, step))]
            host = torch.tensor(starts, dtype=torch.int32, pin_memory=q_TNH.is_cuda)
            tiles_M2 = plan.step_cache[TILES] = host.to(q_TNH.device, non_blocking=True)
        return tiles_M2
