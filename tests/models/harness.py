"""How does a test run a model without an engine? Batches built by hand over pages that start out as NaN.

Invariant: a page is NaN until its slots are written, and again once every position in it has left the window;
block table entries behind a window become -1. So an attention that reads what it must not shows NaN.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from slipstream.attention.base import AttentionBackend
from slipstream.attention.torch_reference import TorchReference
from slipstream.core.batch import ForwardBatch

SEED = 7


@dataclasses.dataclass
class PagedRow:
    """One sequence: its tokens, how many of them stand in the cache, and its block table per group."""

    tokens: list[int]
    num_computed: int = 0
    blocks: list[list[int]] = dataclasses.field(default_factory=list)


class PagedRunner:
    """Runs spans of rows through a model, as an engine would, one step at a time."""

    def __init__(
        self,
        model: Any,
        *,
        block_tokens: int = 4,
        num_pages: int = 512,
        kv_dtype: torch.dtype = torch.float32,
        backend: AttentionBackend | None = None,
    ) -> None:
        self.model = model
        self.block_tokens = block_tokens
        self.backend = backend or TorchReference()
        self.groups = model.cache_groups()
        self.kv_pages: list[Tensor] = []
        self.free: list[list[int]] = []
        self.layer_place = [(0, 0)] * model.config.num_layers
        for group_idx, group in enumerate(self.groups):
            shape = (num_pages, len(group.layers), 2, block_tokens, group.heads, group.head_dim)
            self.kv_pages.append(torch.full(shape, float("nan"), dtype=kv_dtype))
            pages = list(range(num_pages))
            random.Random(SEED).shuffle(pages)
            self.free.append(pages)
            for place, layer in enumerate(group.layers):
                self.layer_place[layer] = (group_idx, place)
        self.num_stale = 0

    def add(self, tokens: Sequence[int]) -> PagedRow:
        return PagedRow(list(tokens), 0, [[] for _ in self.groups])

    def step(self, spans: Sequence[tuple[PagedRow, int]]) -> list[Tensor]:
        """Run the next `count` tokens of each row; return each row's [count, D], in the order given."""
        order = sorted(range(len(spans)), key=lambda i: spans[i][1])
        sorted_spans = [spans[i] for i in order]
        hidden_TD = self.model.forward(self.make_batch(sorted_spans))
        parts = hidden_TD.split([count for _, count in sorted_spans])
        for row, count in sorted_spans:
            row.num_computed += count
            self._drop_stale(row)
        return [parts[order.index(i)] for i in range(len(spans))]

    def make_batch(self, spans: Sequence[tuple[PagedRow, int]]) -> ForwardBatch:
        ids, positions, row_of, starts, lens = [], [], [], [0], []
        slots: list[list[int]] = [[] for _ in self.groups]
        for i, (row, count) in enumerate(spans):
            end = row.num_computed + count
            self._grow(row, end)
            span = range(row.num_computed, end)
            ids += row.tokens[row.num_computed : end]
            positions += span
            row_of += [i] * count
            starts.append(starts[-1] + count)
            lens.append(end)
            for group, table in enumerate(row.blocks):
                slots[group] += [
                    table[p // self.block_tokens] * self.block_tokens + p % self.block_tokens for p in span
                ]
        plan = self.backend.plan(query_lens=[count for _, count in spans], max_seq_lens=lens)
        return ForwardBatch(
            token_ids_T=torch.tensor(ids),
            positions_kT=torch.tensor([positions]),
            row_of_T=torch.tensor(row_of),
            query_start=torch.tensor(starts),
            seq_lens=torch.tensor(lens),
            slot_mapping_T=[torch.tensor(part) for part in slots],
            block_table=[self._table([row for row, _ in spans], g) for g in range(len(self.groups))],
            kv_pages=self.kv_pages,
            layer_place=self.layer_place,
            attention_plan=plan,
            logits_idx=torch.tensor(starts[1:]) - 1,
        )

    def logits(self, tokens: Sequence[int], *, chunk: int) -> Tensor:
        """Return [len(tokens), V] of one sequence run in chunks of `chunk` tokens."""
        row = self.add(tokens)
        parts = []
        while row.num_computed < len(tokens):
            count = min(chunk, len(tokens) - row.num_computed)
            parts.append(self.model.logits(self.step([(row, count)])[0]))
        return torch.cat(parts)

    def greedy(self, prompts: Sequence[Sequence[int]], *, num_new: int, chunk: int) -> list[list[int]]:
        """Decode all prompts together, `chunk` prompt tokens a step, and return each one's new tokens."""
        rows = [self.add(prompt) for prompt in prompts]
        target = [len(prompt) + num_new for prompt in prompts]
        while any(len(row.tokens) < end for row, end in zip(rows, target, strict=True)):
            spans = [
                (row, min(chunk, len(row.tokens) - row.num_computed))
                for row, end in zip(rows, target, strict=True)
                if len(row.tokens) < end
            ]
            for (row, _), hidden_TD in zip(spans, self.step(spans), strict=True):
                if row.num_computed == len(row.tokens):
                    row.tokens.append(int(self.model.logits(hidden_TD[-1:]).argmax()))
        return [row.tokens[len(prompt) :] for row, prompt in zip(rows, prompts, strict=True)]

    def _grow(self, row: PagedRow, end: int) -> None:
        for group, table in enumerate(row.blocks):
            while len(table) * self.block_tokens < end:
                table.append(self.free[group].pop())

    def _table(self, rows: Sequence[PagedRow], group: int) -> Tensor:
        width = max(len(row.blocks[group]) for row in rows)
        return torch.tensor(
            [row.blocks[group] + [-1] * (width - len(row.blocks[group])) for row in rows], dtype=torch.int32
        )

    def _drop_stale(self, row: PagedRow) -> None:
        """Free and poison the blocks that no later query of the row can see."""
        for group_idx, group in enumerate(self.groups):
            if group.kind != "window":
                continue
            first_seen = max(0, row.num_computed - group.window + 1)
            for block in range(first_seen // self.block_tokens):
                page = row.blocks[group_idx][block]
                if page >= 0:
                    self.kv_pages[group_idx][page] = float("nan")
                    self.free[group_idx].insert(0, page)
                    row.blocks[group_idx][block] = -1
                    self.num_stale += 1
