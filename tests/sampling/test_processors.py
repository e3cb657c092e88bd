"""Callables see all ids and change their own row's logits; whatever they do wrong is that row's error."""

import pytest
import torch

from slipstream.core.token_rules import processors
from slipstream.sampling.processors import ProcessorTable


def apply(*callables, rows=(4, 7), tokens=(1, 2, 3, 9), num_prompt=3, vocab=5):
    """Run callables over row 7 of two; returns (logits, errors)."""
    table = ProcessorTable()
    table.register("r", processors(list(callables)))
    table.add(7, "r", list(tokens), num_prompt)
    logits = torch.arange(2.0 * vocab).view(2, vocab)
    return logits, table.apply(logits, list(rows))


def test_a_function_of_generated_ids_returns_logits():
    seen = []

    def keep_one(token_ids, logits):
        seen.append(token_ids)
        return torch.where(torch.arange(5) == 2, logits, -torch.inf)

    logits, errors = apply(keep_one)
    assert not errors and seen == [[9]]
    assert logits[0].tolist() == [0, 1, 2, 3, 4], "the other row has no callable"
    assert (logits[1] > -torch.inf).nonzero().flatten().tolist() == [2] and logits[1, 2] == 7


def test_a_function_of_prompt_and_generated_ids():
    seen = []
    apply(lambda prompt, generated, logits: seen.append((prompt, generated)) or logits)
    assert seen == [([1, 2, 3], [9])]


def test_an_object_that_changes_logits_in_place():
    class Mask:
        def __call__(self, req_id, logits, token_ids, stream_ptr, client_id):
            self.seen = (req_id, tuple(logits.shape), token_ids, stream_ptr, client_id)
            logits[:, :, 3] = -torch.inf

    mask = Mask()
    logits, errors = apply(mask)
    assert not errors and mask.seen == ("r", (1, 1, 5), [[1, 2, 3, 9]], None, None)
    assert logits[1].tolist() == [5, 6, 7, -torch.inf, 9]


def test_callables_run_in_their_order():
    logits, _ = apply(lambda ids, x: x + 1, lambda ids, x: x * 10)
    assert logits[1].tolist() == [60, 70, 80, 90, 100]


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda ids, x: 1 / 0, "ZeroDivisionError"),
        (lambda ids, x: None, "must return logits of shape (5,), not NoneType"),
        (lambda ids, x: x[:2], "not (2,)"),
        (lambda ids, x: x * torch.nan, "NaN"),
        (lambda ids, x: x + torch.inf, "infinity"),
    ],
    ids=["raises", "none", "shape", "nan", "inf"],
)
def test_what_goes_wrong_is_one_rows_error(wrong, words):
    logits, errors = apply(wrong)
    assert list(errors) == [7] and words in errors[7]
    assert logits[0].tolist() == [0, 1, 2, 3, 4]


def test_a_long_message_is_cut():
    def fail(ids, x):
        raise ValueError("x" * 10_000)

    _, errors = apply(fail)
    assert len(errors[7]) < 300


def test_callables_that_stayed_in_another_process_are_missed():
    table = ProcessorTable()
    table.add(0, "r", [1], 1)
    assert "not in this process" in table.apply(torch.zeros(1, 3), [0])[0]


def test_a_callable_cannot_change_what_the_next_one_sees():
    seen = []
    apply(lambda ids, x: ids.clear() or x, lambda ids, x: seen.append(ids) or x)
    assert seen == [[9]]


def test_rows_come_and_go():
    table = ProcessorTable()
    table.add(3, "r", [1], 1)
    assert len(table) == 1 and list(table.among([1, 3])) == [3]
    table.remove(3)
    table.remove(3)
    table.forget("never seen")
    assert len(table) == 0 and table.among([3]) == {}
