"""What is an attention backend? A planner over host bounds, and a run over one layer's queries.

Shapes: T tokens of the step, N query heads, K kv heads, H head size, B rows.
Invariant: `run` stores a layer's K and V before it attends (early prefix reuse relies on it), and `plan`
never waits for the device.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from slipstream.core.batch import ForwardBatch
from slipstream.core.capability import Capability
from slipstream.core.errors import EngineError

if TYPE_CHECKING:
    from torch import Tensor

    from slipstream.kernels.shared_prefix import SharedPrefixes


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionCapability(Capability):
    """What a backend can do. An empty set of sizes means any size.

    `page_sizes` are tokens per block; `batch_invariant` means bit-equal results whatever else is in the
    batch; `graph` means that `run` may be captured and replayed for other lengths, longer spans by the tiles
    that the plan's cache then holds (`kernels.query_tiles.TILES`);
    `cascade` that it reads a plan's `shared`, `tree` its `tree_T`; `native_blocks` that it has `native_step`,
    by which a whole decoder block runs as one native call; `rotates` that it has `rotate_and_run`, which
    takes the projection of q, k and v as it is.
    """

    head_dims: frozenset[int] = frozenset()
    page_sizes: frozenset[int] = frozenset()
    kv_dtypes: frozenset[str] = frozenset({"float32", "float16", "bfloat16"})
    window: bool = False
    latent: bool = False
    tree: bool = False
    cascade: bool = False
    graph: bool = False
    needs_triton: bool = False
    rotates: bool = False
    batch_invariant: bool = False
    native_blocks: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class AttentionSpec:
    """What is constant for one layer. `heads` are this rank's; `window` and `softcap` are 0 where absent."""

    layer_idx: int
    scale: float
    num_kv_heads: int
    head_dim: int
    window: int = 0
    softcap: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Rotation:
    """What happens to q and k between their projection and attention: norms, then rotary positions.

    `table_P2H` is the rotary table by position; the norms are float32 weights, or None. P positions.
    """

    heads: int
    table_P2H: Tensor
    interleaved: bool
    q_norm_H: Tensor | None
    k_norm_H: Tensor | None
    eps: float


class AttentionBackend(Protocol):
    """Turns a layer's queries, keys and values into its attention output, over paged keys and values."""

    capability: AttentionCapability

    def plan(self, *, query_lens: Sequence[int], max_seq_lens: Sequence[int]) -> AttentionPlan:
        """Prepare one step from host bounds, without waiting for the device.

        Row i runs `query_lens[i]` tokens and is at most `max_seq_lens[i]` long after the step. Rows of one
        token come first. Raises EngineError where the two do not fit together.
        """
        ...

    def run(
        self, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, batch: ForwardBatch, spec: AttentionSpec
    ) -> Tensor:
        """Store K and V in the layer's pages, attend, and return [T, N, H]."""
        ...


@dataclasses.dataclass(slots=True)
class AttentionPlan:
    """One step as a backend sees it; make a new one for every step.

    `step_cache` holds what a backend works out on the first layer that needs it and shares with the rest.
    `shared` says which of the one-token rows begin with the same pages, for a backend that serves `cascade`;
    results are the same without it. `tree_T` are the bits of trees of drafts (`kernels/tree_masks.py`), 0 for
    tokens of other spans; None in a step without trees, and for a backend that does not serve `tree`.
    """

    backend: AttentionBackend
    query_lens: tuple[int, ...]
    max_seq_lens: tuple[int, ...]
    num_decodes: int
    max_seq_len: int
    step_cache: dict[Hashable, Any] = dataclasses.field(default_factory=dict)
    shared: SharedPrefixes | None = None
    tree_T: Tensor | None = None

    @classmethod
    def create(
        cls, backend: AttentionBackend, query_lens: Sequence[int], max_seq_lens: Sequence[int]
    ) -> AttentionPlan:
        """Check the bounds and count the leading rows of one token. Raises EngineError for wrong ones."""
        if len(query_lens) != len(max_seq_lens):
            raise EngineError(f"{len(query_lens)} query lengths for {len(max_seq_lens)} sequence lengths.")
        for row, (query_len, seq_len) in enumerate(zip(query_lens, max_seq_lens, strict=True)):
            if not 1 <= query_len <= seq_len:
                raise EngineError(f"Row {row} runs {query_len} tokens of a sequence of at most {seq_len}.")
        num_decodes = next((i for i, n in enumerate(query_lens) if n > 1), len(query_lens))
        return cls(backend, tuple(query_lens), tuple(max_seq_lens), num_decodes, max(max_seq_lens, default=0))

    def run(
        self, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, batch: ForwardBatch, spec: AttentionSpec
    ) -> Tensor:
        return self.backend.run(q_TNH, k_TKH, v_TKH, batch, spec)
