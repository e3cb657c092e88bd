"""How does a layer attend? The step's plan knows the backend; a layer knows its index, scale and window.

T tokens, N query heads, K kv heads, H head size, D hidden size.
Invariant: heads are this rank's, and `Attention` holds no state: keys and values live in the batch's pages.
"""

from __future__ import annotations

from torch import Tensor, nn

from slipstream.attention.base import AttentionSpec, Rotation
from slipstream.core.batch import ForwardBatch
from slipstream.kernels.rotary import rotary
from slipstream.layers.build_context import BuildContext
from slipstream.layers.linear import QKVLinear, RowParallelLinear
from slipstream.layers.norm import RMSNorm
from slipstream.layers.rotary import Rotary


class Attention(nn.Module):
    """Stores one layer's K and V in the cache and attends."""

    def __init__(self, spec: AttentionSpec) -> None:
        super().__init__()
        self.spec = spec

    def forward(self, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, batch: ForwardBatch) -> Tensor:
        """Return [T, N, H]."""
        return batch.attention_plan.run(q_TNH, k_TKH, v_TKH, batch, self.spec)


class SelfAttention(nn.Module):
    """Projections, optional norms of q and k, rotary positions, attention, output projection."""

    def __init__(
        self,
        qkv: QKVLinear,
        output: RowParallelLinear,
        *,
        spec: AttentionSpec,
        rotary_embedding: Rotary,
        q_norm: RMSNorm | None = None,
        k_norm: RMSNorm | None = None,
    ) -> None:
        super().__init__()
        self.qkv, self.output = qkv, output
        self.attention = Attention(spec)
        self.rotary = rotary_embedding
        self.q_norm, self.k_norm = q_norm, k_norm
        self.heads, self.kv_heads, self.head_dim = qkv.num_heads, qkv.num_kv_heads, qkv.head_dim

    @classmethod
    def create(
        cls,
        build: BuildContext,
        hidden_size: int,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        layer_idx: int,
        rotary_embedding: Rotary,
    ) -> SelfAttention:
        """Build the plain kind: no bias, no norms, full attention, scale 1 / sqrt(head_dim)."""
        qkv = QKVLinear(build, hidden_size, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim)
        output = RowParallelLinear(build, num_heads * head_dim, hidden_size)
        spec = AttentionSpec(
            layer_idx=layer_idx, scale=head_dim**-0.5, num_kv_heads=qkv.num_kv_heads, head_dim=head_dim
        )
        return cls(qkv, output, spec=spec, rotary_embedding=rotary_embedding)

    def forward(self, x_TD: Tensor, batch: ForwardBatch) -> Tensor:
        """Return [T, D], reduced over the tensor ranks."""
        return self.output(self.attend(self.qkv(x_TD), batch))

    def attend(self, qkv_TC: Tensor, batch: ForwardBatch) -> Tensor:
        """Return [T, N * H], what the output projection takes, from q, k and v side by side."""
        plan = batch.attention_plan
        if plan.backend.capability.rotates:
            return plan.backend.rotate_and_run(qkv_TC, self._rotation(batch), batch, self.attention.spec)
        num_qk = self.heads + self.kv_heads
        qkv_TAH = qkv_TC.unflatten(-1, (-1, self.head_dim))
        table_T2H = self.rotary(batch)
        qk_TAH, v_TKH = qkv_TAH[:, :num_qk], qkv_TAH[:, num_qk:]
        if self.q_norm is None or self.k_norm is None:
            qk_TAH = rotary(qk_TAH, table_T2H, self.rotary.interleaved)
            q_TNH, k_TKH = qk_TAH[:, : self.heads], qk_TAH[:, self.heads :]
        else:
            q_TNH, k_TKH = self.q_norm(qk_TAH[:, : self.heads]), self.k_norm(qk_TAH[:, self.heads :])
            q_TNH = rotary(q_TNH, table_T2H, self.rotary.interleaved)
            k_TKH = rotary(k_TKH, table_T2H, self.rotary.interleaved)
        return self.attention(q_TNH, k_TKH, v_TKH, batch).flatten(1)

    def _rotation(self, batch: ForwardBatch) -> Rotation:
        q_norm, k_norm = self.q_norm, self.k_norm
        return Rotation(
            heads=self.heads,
            table_P2H=self.rotary.table(batch.attention_plan.max_seq_len),
            interleaved=self.rotary.interleaved,
            q_norm_H=None if q_norm is None else q_norm.weight,
            k_norm_H=None if k_norm is None else k_norm.weight,
            eps=0.0 if q_norm is None else q_norm.eps,
        )
