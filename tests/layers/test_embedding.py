"""Do vocabulary shards look up and score as the whole table does, padding and overlays included?"""

from __future__ import annotations

import types
from typing import Any

import torch

from slipstream.layers.build_context import BuildContext
from slipstream.layers.embedding import LMHead, VocabEmbedding
from tests.layers.shards import contexts, draw, fill

VOCAB = 11
TABLE = draw(VOCAB, 6)
IDS = torch.tensor([0, 10, 5, 6, 5])


def batch(**fields: Any) -> Any:
    return types.SimpleNamespace(
        **{"token_ids_T": IDS, "embedding_overlay_TD": None, "embedding_mask_T": None} | fields
    )


def test_shards_of_an_odd_vocabulary_sum_to_the_table() -> None:
    total = torch.zeros(5, 6)
    for context in contexts():
        embedding = VocabEmbedding(context, VOCAB, 6)
        fill(embedding.weight, TABLE)
        total += embedding(batch())
    assert torch.equal(total, TABLE[IDS])


def test_heads_of_an_odd_vocabulary_concatenate() -> None:
    hidden, parts = draw(3, 6, seed=1), []
    for context in contexts():
        head = LMHead(context, VOCAB, 6)
        fill(head.weight, TABLE)
        parts.append(head(hidden))
    logits = torch.cat(parts, -1)
    torch.testing.assert_close(logits[:, :VOCAB], hidden @ TABLE.T)
    assert torch.equal(logits[:, VOCAB:], torch.zeros(3, 1))


def test_the_bias_of_a_head_is_cut_with_its_rows() -> None:
    hidden, bias, parts = draw(3, 6, seed=1), draw(VOCAB, seed=3), []
    for context in contexts():
        head = LMHead(context, VOCAB, 6, bias=True)
        assert head.bias is not None and head.bias.shape == (6,)
        fill(head.weight, TABLE)
        fill(head.bias, bias)
        parts.append(head(hidden))
    logits = torch.cat(parts, -1)
    torch.testing.assert_close(logits[:, :VOCAB], hidden @ TABLE.T + bias)
    assert torch.equal(logits[:, VOCAB:], torch.zeros(3, 1))


def test_logits_are_float32_and_as_wide_as_the_vocabulary() -> None:
    head = LMHead(BuildContext(dtype=torch.bfloat16), VOCAB, 6)
    fill(head.weight, TABLE)
    logits = head(draw(3, 6).bfloat16())
    assert logits.dtype == torch.float32 and logits.shape == (3, VOCAB)


def test_a_tied_head_is_the_embeddings_own_parameter() -> None:
    embedding = VocabEmbedding(BuildContext(), VOCAB, 6)
    assert LMHead(BuildContext(), VOCAB, 6, tied=embedding).weight is embedding.weight


def test_overlay_replaces_scaled_rows() -> None:
    embedding = VocabEmbedding(BuildContext(), VOCAB, 6, scale=2.0)
    fill(embedding.weight, TABLE)
    mask, overlay = torch.tensor([False, True, False, False, True]), draw(5, 6, seed=2)
    given = embedding(batch(embedding_overlay_TD=overlay, embedding_mask_T=mask))
    assert torch.equal(given, torch.where(mask[:, None], overlay, 2.0 * TABLE[IDS]))
