"""How do token ids become vectors, and hidden states scores over the vocabulary?

Vocabulary rows are cut over the tensor ranks, the last rank's share padded with zeros. A tied head is the
embedding's own parameter, not a copy.
T tokens, R rows, D hidden size, V vocabulary. Invariant: logits are float32 and exactly V wide on every rank.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from slipstream.core.batch import ForwardBatch
from slipstream.layers.build_context import BuildContext
from slipstream.layers.packed_parameter import PackedParameter
from slipstream.layers.parameter import Parameter, Slot, even_slot


class VocabEmbedding(nn.Module):
    """One vector per token id, times `scale`."""

    def __init__(self, build: BuildContext, vocab_size: int, hidden_size: int, *, scale: float = 1.0) -> None:
        super().__init__()
        self.mesh, self.quant, self.scale = build.mesh, build.quant, scale
        self.weight = vocab_matrix(build, vocab_size, hidden_size)

    def forward(self, batch: ForwardBatch) -> Tensor:
        """Return [T, D]; rows under `embedding_mask_T` come from `embedding_overlay_TD`, unscaled."""
        x_TD = self.look_up(batch.token_ids_T)
        if self.scale != 1.0:
            x_TD = x_TD * self.scale
        if batch.embedding_overlay_TD is None or batch.embedding_mask_T is None:
            return x_TD
        return torch.where(
            batch.embedding_mask_T.unsqueeze(1), batch.embedding_overlay_TD.to(x_TD.dtype), x_TD
        )

    def look_up(self, token_ids_T: Tensor) -> Tensor:
        if self.mesh.tp_size == 1:
            return self.quant.look_up(self, token_ids_T)
        slot = self.weight.slots[""]
        local_T = token_ids_T - slot.start
        is_mine_T = (local_T >= 0) & (local_T < slot.length)
        x_TD = embedding(local_T.where(is_mine_T, 0), self.weight)
        return self.mesh.all_reduce(x_TD * is_mine_T.unsqueeze(1))


class LMHead(nn.Module):
    """Scores over the vocabulary; shares `tied`'s parameter where that is given."""

    def __init__(
        self,
        build: BuildContext,
        vocab_size: int,
        hidden_size: int,
        *,
        tied: VocabEmbedding | None = None,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.mesh, self.quant, self.vocab_size = build.mesh, build.quant, vocab_size
        self.weight = tied.weight if tied else vocab_matrix(build, vocab_size, hidden_size)
        self.bias: Parameter | None = vocab_parameter(build, vocab_size) if bias else None

    def forward(self, hidden_RD: Tensor) -> Tensor:
        """Return [R, V] float32."""
        logits_RV = self.quant.apply(self, hidden_RD)
        if self.bias is not None:
            logits_RV = logits_RV.add_(self.bias)
        logits_RV = self.mesh.all_gather(logits_RV, -1)
        return logits_RV[:, : self.vocab_size].float()


def vocab_matrix(build: BuildContext, vocab_size: int, hidden_size: int) -> Parameter:
    """Return this rank's rows of the embedding or the head, as the quantisation method keeps a matrix."""
    spec = build.quant.create(in_features=hidden_size, out_features=vocab_size, dtype=build.dtype)["weight"]
    if spec.packing is None:
        return vocab_parameter(build, vocab_size, hidden_size)
    return PackedParameter.create_packed(
        spec.shape,
        spec.packing,
        device=build.device,
        dim=0,
        slots={"": even_slot(vocab_size, rank=build.mesh.tp_rank, size=build.mesh.tp_size)},
    )


def vocab_parameter(build: BuildContext, vocab_size: int, *row: int) -> Parameter:
    """Return this rank's rows, each of shape `row`, of a tensor over the vocabulary; padding is zero."""
    rows = -(-vocab_size // build.mesh.tp_size)
    start = min(build.mesh.tp_rank * rows, vocab_size)
    slot = Slot(vocab_size, start, min(rows, vocab_size - start))
    weight = Parameter.create((rows, *row), dtype=build.dtype, device=build.device, dim=0, slots={"": slot})
    weight.data[slot.length :].zero_()
    return weight
