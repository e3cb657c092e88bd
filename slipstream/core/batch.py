"""What does one forward pass read? `ForwardBatch`: a flat record of address-stable tensors.

Shapes: T tokens of the step, B rows in it, k position streams (1 for text), S slots.
Attention is one registered op over these tensors and integers, so a graph captures it and an exporter traces
it. Row order in the batch is the plan's span order, short spans first.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


@dataclasses.dataclass(slots=True)
class ForwardBatch:
    """Inputs of `model.forward`. `row_of_T` and `block_table` are batch-local (0..B-1).

    `seq_lens` [B] is the length of each row after this step. Per cache group g: `slot_mapping_T[g]` [T] is
    page * block_tokens + offset of each token's K and V, `block_table[g]` [B, max blocks] the pages,
    `kv_pages[g]` the group's view of the pool, [pages, layers of a page, 2, block_tokens, heads, head_dim]
    (2: K, then V).
    `layer_place[layer] = (group, place in the page)`, bound by the runner after `resolve`.
    """

    token_ids_T: Tensor
    positions_kT: Tensor
    row_of_T: Tensor
    query_start: Tensor
    seq_lens: Tensor
    slot_mapping_T: list[Tensor]
    block_table: list[Tensor]
    kv_pages: list[Tensor]
    layer_place: list[tuple[int, int]]
    attention_plan: Any
    logits_idx: Tensor
    adapter_idx_T: Tensor | None = None
    embedding_overlay_TD: Tensor | None = None
    embedding_mask_T: Tensor | None = None
    num_tokens_per_dp_rank: Tensor | None = None
