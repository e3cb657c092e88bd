"""Rules on what came before equal transformers' processors and their definition, as tokens are drawn."""

import numpy as np
import pytest
import torch
from transformers.generation.logits_process import NoBadWordsLogitsProcessor, NoRepeatNGramLogitsProcessor

from slipstream.core.sampling_params import RowSampling
from slipstream.sampling.base import ALL_MASKED
from slipstream.sampling.history import NgramRule, TokenHistory, mask_repeats
from tests.sampling.test_sampler import PROMPT, make


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_no_repeated_ngrams_as_in_transformers(size):
    vocab, steps = 12, 40
    processor = NoRepeatNGramLogitsProcessor(size)
    sampler = make(vocab, [RowSampling(), RowSampling(no_repeat_ngram_size=size)])
    ids = torch.tensor([PROMPT])
    num_masked = 0
    # The same few tokens win again and again, so that their n-grams would repeat.
    favourites = torch.randn(vocab, generator=torch.Generator().manual_seed(size)) * 5
    for step in range(steps):
        x = favourites + torch.randn(vocab, generator=torch.Generator().manual_seed(100 + step))
        expected = processor(ids, x.clone()[None])
        edited = x.repeat(2, 1)
        tokens = sampler.sample(edited, [0, 1]).tokens()
        assert torch.equal(edited[0], x), "the neighbour's logits are its own"
        if expected.max() == -torch.inf:
            break
        assert torch.equal(edited[1], expected[0]) and tokens[1] == int(expected.argmax())
        num_masked += int((expected == -torch.inf).sum())
        ids = torch.cat((ids, torch.tensor([tokens[1:]])), dim=1)
    assert num_masked > 3


def test_a_text_without_any_unused_ngram_fails_alone():
    sampler = make(3, [RowSampling(no_repeat_ngram_size=1), RowSampling()])
    # The prompt holds 1 and 2 of three tokens; the buffer's 3 is out of this vocabulary and never a place.
    sampler.record.tokens[0, :3] = torch.tensor([0, 1, 2])
    assert sampler.sample(torch.zeros(2, 3), [0, 1]).statuses() == [ALL_MASKED, 0]


def test_only_the_row_own_tokens_count():
    """What an earlier request left in the buffer behind a row's length is not its history."""
    history = TokenHistory(torch.tensor([[1, 2, 1, 2, 3, 3]], dtype=torch.int32), torch.tensor([3]))
    x = torch.zeros(1, 6)
    rule = NgramRule(2, torch.tensor([0]), torch.tensor([0]), [0])
    mask_repeats(x, history, rule, width=6)
    assert (x[0] == -torch.inf).nonzero()[:, 0].tolist() == [2]


def naive(sequences, output, vocab):
    masked = {
        s[-1] for s in sequences if len(s) <= len(output) + 1 and output[len(output) - len(s) + 1 :] == s[:-1]
    }
    return [token in masked for token in range(vocab)]


def test_bad_sequences_follow_their_definition_over_the_output():
    vocab = 6
    rng = np.random.default_rng(0)
    lists = [
        [tuple(rng.integers(0, vocab, size=n).tolist()) for n in rng.integers(2, 5, size=12)]
        for _ in range(3)
    ]
    # The prompt's own end would complete this one: it does not count.
    lists[0].append((PROMPT[-1], 4))
    sampled = [RowSampling(temperature=5.0, bad_sequences=tuple(sequences)) for sequences in lists]
    sampler = make(vocab, sampled)
    outputs = [[] for _ in lists]
    num_masked = 0
    for step in range(40):
        x = torch.randn(len(lists), vocab, generator=torch.Generator().manual_seed(step))
        edited = x.clone()
        output = sampler.sample(edited, list(range(len(lists))))
        for i, sequences in enumerate(lists):
            expected = naive([list(s) for s in sequences], outputs[i], vocab)
            assert (edited[i] == -torch.inf).tolist() == expected
            num_masked += sum(expected)
            outputs[i].append(output.tokens()[i])
    assert num_masked > 50


def test_bad_words_as_in_transformers():
    vocab, eos = 50, 49
    words = [[5], [8, 9], [9, 3, 8], [8, 9, 10, 11]]
    processor = NoBadWordsLogitsProcessor(words, eos_token_id=eos)
    row = RowSampling(bad_ids=(5,), bad_sequences=tuple(tuple(word) for word in words[1:]))
    sampler = make(vocab, [row])
    ids = torch.tensor([PROMPT])
    for step in range(30):
        x = torch.randn(1, vocab, generator=torch.Generator().manual_seed(step))
        x[0, [3, 5, 8, 9, 10, 11]] += 4
        expected = processor(ids, x.clone())
        edited = x.clone()
        tokens = sampler.sample(edited, [0]).tokens()
        assert torch.equal(edited, expected)
        ids = torch.cat((ids, torch.tensor([tokens])), dim=1)
    text = ids[0].tolist()
    assert 5 not in text and 8 in text and 9 in text
    assert not any(text[i : i + 2] == [8, 9] for i in range(len(text)))


def test_allowed_and_bad_ids_leave_what_they_say():
    vocab = 40
    x = torch.randn(2, vocab, generator=torch.Generator().manual_seed(1))
    sampler = make(vocab, [RowSampling(allowed_ids=(3, 7, 9, 20), bad_ids=(7, 30)), RowSampling()])
    edited = x.clone()
    sampler.sample(edited, [0, 1])
    left = (edited[0] > -torch.inf).nonzero()[:, 0].tolist()
    assert left == [3, 9, 20] and torch.equal(edited[0, left], x[0, left])
    assert torch.equal(edited[1], x[1])
