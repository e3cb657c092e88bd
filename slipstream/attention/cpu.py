"""How does attention run on a CPU's own kernels? Over pages as they lie, without gathering them.

The kernels (`kernels/cpu/src/attention.h`) cut the context into chunks of a fixed size, so a query's result
has the same bits whatever else is in the step and however many threads there are. A whole decoder block may
run as one native call over the same step: `native_step` describes a step to it.
Invariant: nothing here depends on a layer but its place in the pages; a step is described once.
"""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from slipstream.attention.base import AttentionCapability, AttentionPlan, AttentionSpec
from slipstream.core.batch import ForwardBatch
from slipstream.kernels.cpu.block_records import Block, GroupStep, KvPages, Step
from slipstream.kernels.cpu.library import library
from slipstream.kernels.cpu.threads import use_threads

MAX_HEAD_DIM = 512
SEQ_LEN_STEP = 1024
# Calls whose need of scratch is remembered; far more than an engine's steps differ in.
MAX_FITTED = 4096


@dataclasses.dataclass(slots=True)
class NativeStep:
    """One step as the block kernels read it. `kept` are the tensors its addresses point into."""

    address: int
    max_seq_len: int
    tokens: int
    layer_strides: list[int]
    scratch: Scratch
    kept: list[Any]


class Scratch:
    """Memory that the kernels of one engine work in; grows, and is never read after a call."""

    def __init__(self) -> None:
        self._library = library()
        self._memory = torch.empty(0, dtype=torch.uint8)
        self.address = 0
        self._num_bytes = 0
        self._fitted: set[tuple[int, ...]] = set()

    def reserve(self, num_bytes: int) -> int:
        """Return the address, aligned to 64, of at least `num_bytes`; it holds until more are asked for."""
        if num_bytes > self._num_bytes:
            self._memory = torch.empty(num_bytes + 64, dtype=torch.uint8)
            self.address = -(-self._memory.data_ptr() // 64) * 64
            self._num_bytes = num_bytes
        return self.address

    def fit(self, call: tuple[int, ...], measure: Callable[[], int]) -> int:
        """Return the address for a call that `call` describes; asks `measure` only for what is new.

        What a call needs grows with the threads, which another engine may change.
        """
        key = (*call, self._library.ss_num_threads())
        if key not in self._fitted:
            if len(self._fitted) >= MAX_FITTED:
                self._fitted.clear()
            self.reserve(measure())
            self._fitted.add(key)
        return self.address


def round_up_seq_len(max_seq_len: int) -> int:
    """Return a bound for scratch, which follows the longest sequence in steps, not token by token."""
    return -(-max_seq_len // SEQ_LEN_STEP) * SEQ_LEN_STEP


class CpuPaged:
    """Paged attention of the CPU kernels. Raises LibraryUnavailable where they cannot be had."""

    capability = AttentionCapability(
        devices=frozenset({"cpu"}),
        head_dims=frozenset(range(8, MAX_HEAD_DIM + 1, 8)),
        kv_dtypes=frozenset({"float32", "float16"}),
        window=True,
        batch_invariant=True,
        native_blocks=True,
    )

    def __init__(self) -> None:
        self.library = library()
        self.scratch = Scratch()
        self.records = StepRecords()
        use_threads()

    def plan(self, *, query_lens: Sequence[int], max_seq_lens: Sequence[int]) -> AttentionPlan:
        return AttentionPlan.create(self, query_lens, max_seq_lens)

    def run(
        self, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, batch: ForwardBatch, spec: AttentionSpec
    ) -> Tensor:
        """Store K and V, then attend; all in float32, whatever the pages hold."""
        step = self.native_step(batch)
        q, k, v = (x.float().contiguous() for x in (q_TNH, k_TKH, v_TKH))
        block = attention_block(spec, batch, step, heads=q.shape[1])
        address = ctypes.addressof(block)
        out = torch.empty_like(q)
        needed = self.library.ss_block_scratch_bytes(address, step.tokens, step.max_seq_len)
        scratch = step.scratch.reserve(needed)
        status = self.library.ss_attention(
            address, step.address, q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), scratch
        )
        assert status == 0, "the capability lets no other head size through"
        return out.to(q_TNH.dtype)

    def native_step(self, batch: ForwardBatch) -> NativeStep:
        """Return the step as the kernels read it, made by the first layer that asks."""
        plan: AttentionPlan = batch.attention_plan
        step = plan.step_cache.get("native")
        if step is None:
            records = self.records
            kept = records.fill(batch, plan)
            step = plan.step_cache["native"] = NativeStep(
                address=records.address,
                max_seq_len=plan.max_seq_len,
                tokens=records.step.tokens,
                layer_strides=records.layer_strides,
                scratch=self.scratch,
                kept=kept,
            )
        return step


def attention_block(spec: AttentionSpec, batch: ForwardBatch, step: NativeStep, *, heads: int) -> Block:
    """Return a block record with the fields that attention reads."""
    group, place = batch.layer_place[spec.layer_idx]
    return Block(
        heads=heads,
        kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        group=group,
        window=spec.window,
        scale=spec.scale,
        softcap=spec.softcap,
        place_offset=place * step.layer_strides[group],
    )


class StepRecords:
    """The records of the step at hand. One set serves every step: a call ends before the next begins."""

    def __init__(self) -> None:
        self.step = Step()
        self.address = ctypes.addressof(self.step)
        self.layer_strides: list[int] = []
        self._groups: Any = None
        # Addresses, not the pages themselves: an engine that sleeps must be able to free them.
        self._bound: list[tuple[int, torch.Size, torch.dtype]] = []

    def fill(self, batch: ForwardBatch, plan: AttentionPlan) -> list[Any]:
        """Describe a step; returns what must live as long as the description is used."""
        self.bind(batch.kv_pages)
        kept: list[Any] = []

        def address(tensor: Tensor, dtype: torch.dtype) -> int:
            ready = tensor.to(dtype).contiguous()
            kept.append(ready)
            return ready.data_ptr()

        tables = zip(self._groups, batch.slot_mapping_T, batch.block_table, strict=True)
        for group, slots_T, table_BM in tables:
            group.slots = address(slots_T, torch.int64)
            group.block_table = address(table_BM, torch.int32)
            group.table_stride = table_BM.shape[1]
        step = self.step
        step.tokens = batch.token_ids_T.shape[0]
        step.rows = len(plan.query_lens)
        step.positions = address(batch.positions_kT[0], torch.int64)
        step.query_start = address(batch.query_start, torch.int64)
        step.max_seq_len = plan.max_seq_len
        return kept

    def bind(self, kv_pages: list[Tensor]) -> None:
        """Say where the pages of each group lie, if that has changed."""
        # Other pages may come to lie where freed ones lay.
        found = [(pages.data_ptr(), pages.shape, pages.dtype) for pages in kv_pages]
        if found == self._bound:
            return
        self._bound = found
        self._groups = (GroupStep * len(kv_pages))()
        self.step.groups = ctypes.addressof(self._groups)
        self.layer_strides = [pages.stride(1) for pages in kv_pages]
        for group, pages in zip(self._groups, kv_pages, strict=True):
            group.pages = KvPages(
                base=pages.data_ptr(),
                page_stride=pages.stride(0),
                value_offset=pages.stride(2),
                token_stride=pages.stride(3),
                block_tokens=pages.shape[3],
                element_bytes=pages.element_size(),
                head_dim=pages.shape[5],
            )
