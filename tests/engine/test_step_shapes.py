"""Which steps are captured, which of them serves a plan, and what is captured first?"""

from __future__ import annotations

import functools
from typing import Any

from slipstream.core.plan import Span, StepPlan
from slipstream.engine.graph_config import DEFAULT_SIZES
from slipstream.engine.step_shapes import LONE_TOKENS, StepShape, StepShapes, shape_needed

DEFAULT = StepShapes.create(DEFAULT_SIZES, has_padding=True, max_num_tokens=8192, max_seq_len=8192)


def plan_of(*spans: Span, sample: list[int] | None = None, **fields: Any) -> StepPlan:
    rows = [span.row for span in spans] if sample is None else sample
    return StepPlan(0, spans=list(spans), sample=rows, **fields)


def first(shapes: StepShapes, *need: int) -> StepShape | None:
    return next(shapes.serving(StepShape(*need)), None)


def test_what_a_plan_needs() -> None:
    three = [Span(row, 9, 1) for row in (4, 0, 2)]
    assert shape_needed(plan_of(*three)) == StepShape(3)
    for other in (
        plan_of(*three, sample=[4, 0]),
        plan_of(*three, sample=[0, 4, 2]),
        plan_of(*three, logits=[(4, 9, 1, "hidden_states")]),
        plan_of(*three, Span(1, 0, 5), logits=[(1, 0, 5, "prompt_logprobs")]),
        plan_of(Span(1, 9, 2, parents=(-1, 0))),
        # One-token rows come first, or they are not where a captured step looks for them.
        plan_of(Span(1, 0, 5), Span(2, 9, 1)),
        plan_of(),
    ):
        assert shape_needed(other) is None
    # Beside a prompt a piece of one token may be quiet.
    assert shape_needed(plan_of(*three, Span(1, 0, 5), Span(5, 7, 9), sample=[4, 1])) == StepShape(3, 2, 14)
    assert shape_needed(plan_of(Span(1, 0, 5), sample=[])) == StepShape(0, 1, 5)


def test_decode_steps_are_padded_or_exact() -> None:
    shapes = StepShapes.create((1, 2, 4), has_padding=True, max_num_tokens=64, max_seq_len=64)
    assert [shape.rows for shape in shapes.serving(StepShape(2))] == [2, 4]
    assert first(shapes, 3) == StepShape(4) and first(shapes, 5) is None
    exact = StepShapes.create((1, 4), has_padding=False, max_num_tokens=64, max_seq_len=64)
    assert first(exact, 4) == StepShape(4) and first(exact, 3) is None and not exact.mixed
    assert first(exact, 0, 1, 20) == StepShape(0, 1, 32)
    nothing = StepShapes.create((), has_padding=True, max_num_tokens=64, max_seq_len=64)
    assert not len(nothing) and not nothing.in_order() and first(nothing, 0, 1, 20) is None


def test_a_lone_prompt_is_padded_by_an_eighth_at_most() -> None:
    for tokens in range(2, 2049):
        shape = first(DEFAULT, 0, 1, tokens)
        assert shape is not None and shape.rows == 0 and shape.prompts == 1
        # Below 64 tokens a product reads its weights and nothing else.
        assert tokens <= 64 or shape.tokens - tokens <= max(32, shape.tokens / 8)
    assert first(DEFAULT, 0, 1, 2049) is None
    short = StepShapes.create((1,), has_padding=True, max_num_tokens=100, max_seq_len=50)
    assert [shape.tokens for shape in short.lone] == [16, 32, 50]


def test_a_mixed_step_takes_the_cheapest_that_holds_it() -> None:
    assert first(DEFAULT, 32, 1, 256) == StepShape(32, 1, 256)
    assert first(DEFAULT, 32, 2, 256) == StepShape(32, 8, 256)
    assert first(DEFAULT, 33, 1, 250) == StepShape(64, 1, 256)
    assert first(DEFAULT, 0, 3, 60) == StepShape(8, 8, 64)
    assert first(DEFAULT, 100, 16, 1000) == StepShape(128, 16, 1024)
    for too_much in ((257, 1, 64), (8, 9, 100), (8, 1, 1025)):
        assert first(DEFAULT, *too_much) is None
    for shape in DEFAULT.serving(StepShape(8, 1, 400)):
        assert shape.holds(StepShape(8, 1, 400)) and shape.num_tokens <= 2 * 408
    few = StepShapes.create((1, 5), has_padding=True, max_num_tokens=200, max_seq_len=4096)
    assert {(shape.rows, shape.tokens) for shape in few.mixed} == {(5, n) for n in (64, 128, 192, 200)}
    assert few.token_steps == (64, 128, 192, 200)


def test_rows_that_begin_alike_have_steps_of_their_own() -> None:
    create = functools.partial(StepShapes.create, max_num_tokens=64, max_seq_len=64, shares=True)
    shapes, alike = create((1, 2, 4, 16), has_padding=True), StepShape(3, shared=True)
    expected = [StepShape(4, shared=True), StepShape(4), StepShape(16)]
    assert list(shapes.serving(alike)) == expected and list(shapes.serving(StepShape(3))) == expected[1:]
    assert list(create((1, 2, 3, 4), has_padding=False).serving(alike)) == [alike, StepShape(3)]
    plain = StepShapes.create((4,), has_padding=True, max_num_tokens=64, max_seq_len=64)
    assert list(plain.serving(alike)) == [StepShape(4)] and not plain.shared
    order = shapes.in_order()
    assert len(order) == len(set(order)) == len(shapes)
    assert [shape.rows for shape in order if shape.shared] == [16, 4, 2]
    assert order[:2] == shapes.largest()[:2] == [StepShape(16), StepShape(16, shared=True)]


def test_rows_that_draw_have_steps_of_their_own() -> None:
    create = functools.partial(StepShapes.create, max_num_tokens=64, max_seq_len=64, draws=True)
    shapes, drawing = create((1, 2, 4, 16), has_padding=True), StepShape(3, draws=True)
    expected = [StepShape(4, draws=True), StepShape(4), StepShape(16)]
    assert list(shapes.serving(drawing)) == expected and list(shapes.serving(StepShape(3))) == expected[1:]
    assert expected[0].holds(drawing) and not expected[1].holds(drawing)
    assert expected[0].holds(StepShape(3)) and not shapes.shared
    assert list(create((1, 3, 4), has_padding=False).serving(drawing)) == [drawing, StepShape(3)]
    plain = StepShapes.create((4,), has_padding=True, max_num_tokens=64, max_seq_len=64)
    assert list(plain.serving(drawing)) == [StepShape(4)]
    # Without a step that does both, the common beginning is what is kept.
    both = create((1, 2, 4, 16), has_padding=True, shares=True)
    assert list(both.serving(StepShape(3, shared=True, draws=True))) == [
        StepShape(4, shared=True, draws=True),
        StepShape(4, shared=True),
        StepShape(4),
        StepShape(16),
    ]
    order = both.in_order()
    assert len(order) == len(set(order)) == len(both) == len(both.sizes) * 4 - 2 + len(both.lone + both.mixed)
    largest = both.largest()
    assert [shape for shape in largest if shape.draws] == [
        StepShape(16, draws=True),
        StepShape(16, shared=True, draws=True),
    ]
    # Behind the largest they come last.
    rest = [shape.draws for shape in order[len(largest) :]]
    assert rest == sorted(rest) and sum(rest) == 5


def test_engines_too_small_for_prompts_capture_none() -> None:
    one = StepShapes.create((1,), has_padding=True, max_num_tokens=1, max_seq_len=64)
    assert one.in_order() == [StepShape(1)] and one.token_steps == ()
    two = StepShapes.create((1, 2), has_padding=True, max_num_tokens=2, max_seq_len=2)
    assert two.lone == (StepShape(0, 1, 2),) and {shape.tokens for shape in two.mixed} == {2}


def test_the_largest_come_first_and_every_shape_once() -> None:
    order = DEFAULT.in_order()
    assert order[:3] == [StepShape(1024), StepShape(256, 16, 1024), StepShape(0, 1, 2048)]
    assert len(order) == len(set(order)) == len(DEFAULT)
    # A few of every kind come early, so that soon everything has something that serves it.
    early = order[: len(order) // 3]
    assert {shape.rows for shape in early if not shape.prompts} >= {2**n for n in range(11)}
    assert {shape.tokens for shape in early if not shape.rows} >= {16, 128, 1024, 2048}
    assert {(shape.rows, shape.prompts) for shape in early if shape.tokens == 256} >= {(32, 1), (32, 8)}
    assert DEFAULT.lone[-1].tokens == LONE_TOKENS[-1] == 2048


def test_shapes_say_what_they_are() -> None:
    assert str(StepShape(4)) == "decoding 4 rows"
    assert str(StepShape(4, shared=True)) == "decoding 4 rows that begin alike"
    assert str(StepShape(4, draws=True)) == "decoding 4 rows with draws"
    assert str(StepShape(8, 1, 64)) == "decoding 8 rows beside 1 prompts of 64 tokens"
