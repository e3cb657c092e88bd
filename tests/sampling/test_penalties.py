"""Penalties equal transformers' processor and OpenAI's formula, counted at admission or one by one."""

import pytest
import torch
from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

from slipstream.sampling.penalties import FIRST_SLOTS, FIRST_WIDTH, PenaltyTables

VOCAB = 97
CPU = torch.device("cpu")


def tables(max_rows=64):
    return PenaltyTables(max_rows=max_rows, vocab_size=VOCAB, device=CPU)


def logits(rows=1, seed=0):
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 4


def penalised(table, x, slots, repetition=1.0, presence=0.0, frequency=0.0, index=None):
    x = x.clone()
    n = len(slots)
    table.penalise(
        x,
        torch.tensor(index if index is not None else list(range(n))),
        torch.tensor(slots),
        repetition_P=torch.full((n,), repetition),
        presence_P=torch.full((n,), presence),
        frequency_P=torch.full((n,), frequency),
    )
    return x


def count(table, slot, token):
    table.count(torch.tensor([token]), torch.tensor([0]), torch.tensor([slot]))


def by_formula(x, outputs, presence, frequency):
    counts = torch.bincount(torch.tensor(outputs, dtype=torch.int64), minlength=VOCAB)
    return x - counts * frequency - (counts > 0) * presence


@pytest.mark.parametrize("penalty", [0.5, 1.0, 1.3, 10.0])
def test_repetition_is_transformers(penalty):
    table, x = tables(), logits()
    tokens = [3, 5, 5, 90, 3, 11]
    slot = table.claim(tokens, 4)
    expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([tokens]), x.clone())
    assert torch.equal(penalised(table, x, [slot], repetition=penalty), expected)


@pytest.mark.parametrize(("presence", "frequency"), [(0.7, 0.0), (0.0, 0.3), (-1.0, 0.25), (2.0, -2.0)])
def test_presence_and_frequency_count_the_output_alone(presence, frequency):
    table, x = tables(), logits()
    slot = table.claim([3, 5, 5, 90, 3, 11, 3], 4)
    got = penalised(table, x, [slot], presence=presence, frequency=frequency)
    # Two float32 subtractions in either order: a rounding of logits of size 10 is 1e-6.
    torch.testing.assert_close(got, by_formula(x, [3, 11, 3], presence, frequency), rtol=0, atol=4e-6)


def test_tokens_counted_one_by_one_equal_tokens_at_admission():
    prompt, outputs = [1, 2, 3], [7, 7, 2, 50, 7]
    table, x = tables(), logits()
    whole = table.claim(prompt + outputs, 3)
    stepwise = table.claim(prompt, 3)
    for token in outputs:
        count(table, stepwise, token)
    ask = {"repetition": 1.4, "presence": 0.5, "frequency": 0.2}
    assert torch.equal(penalised(table, x, [whole], **ask), penalised(table, x, [stepwise], **ask))


def test_rows_keep_apart_and_others_stay_untouched():
    table, x = tables(), logits(rows=4)
    first, second = table.claim([1, 2], 1), table.claim([8, 9, 9], 1)
    got = penalised(table, x, [first, second], index=[3, 1], presence=1.0, frequency=0.5)
    assert torch.equal(got[0], x[0]) and torch.equal(got[2], x[2])
    torch.testing.assert_close(got[3], by_formula(x[3], [2], 1.0, 0.5), rtol=0, atol=4e-6)
    torch.testing.assert_close(got[1], by_formula(x[1], [9, 9], 1.0, 0.5), rtol=0, atol=4e-6)


def test_a_released_slot_forgets():
    table, x = tables(max_rows=1), logits()
    slot = table.claim([1, 2, 3], 1)
    count(table, slot, 4)
    table.release(slot)
    again = table.claim([9, 4], 2)
    assert again == slot
    assert torch.equal(penalised(table, x, [again], presence=5.0, frequency=5.0), x)
    changed = (penalised(table, x, [again], repetition=2.0) != x).nonzero()
    assert changed.tolist() == [[0, 4], [0, 9]]


def test_slots_double_up_to_the_rows_and_keep_their_counts():
    table, x = tables(max_rows=10), logits()
    assert table.num_slots == 0
    first = table.claim([1, 2], 1)
    assert table.num_slots == FIRST_SLOTS
    before = penalised(table, x, [first], frequency=1.0)
    slots = [first] + [table.claim([1], 1) for _ in range(9)]
    assert table.num_slots == 10 and len(set(slots)) == 10
    assert torch.equal(penalised(table, x, [first], frequency=1.0), before)


def test_lists_grow_past_their_first_width():
    table, x = tables(), logits()
    outputs = [int(t) for t in torch.randint(0, VOCAB, (FIRST_WIDTH + 50,), generator=torch.Generator())]
    slot = table.claim([5], 1)
    for token in outputs:
        count(table, slot, token)
    got = penalised(table, x, [slot], presence=0.5, frequency=0.125)
    torch.testing.assert_close(got, by_formula(x, outputs, 0.5, 0.125), rtol=0, atol=4e-6)


def test_a_long_life_of_short_requests_does_not_widen_the_lists():
    table = tables()
    for _ in range(20):
        slot = table.claim([1, 2, 3], 3)
        for token in range(50):
            count(table, slot, token)
        table.release(slot)
    assert table._seen_SW.shape[1] == FIRST_WIDTH
