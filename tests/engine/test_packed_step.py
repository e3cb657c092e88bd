"""Does a captured step read what the host wrote? Lines, where tokens begin, and every tile of queries."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import torch

from slipstream.attention import triton as backend_file
from slipstream.core.plan import Span
from slipstream.engine.packed_step import NO_BOUND, NOWHERE, Inside, Layout, PackedViews, lines_of
from slipstream.engine.step_shapes import StepShape
from slipstream.kernels.query_tiles import TILES

LAYOUT = Layout(tile_queries=16, tiles_rows=False)


def views(host: np.ndarray, shape: StepShape, layout: Layout = LAYOUT) -> PackedViews:
    """Look at it as a step does, in a longer buffer."""
    return PackedViews.of(torch.cat((torch.from_numpy(host), torch.full((9,), 77))), shape, layout)


def leading(rows: list[int]) -> Inside:
    return Inside(rows, [-1] * len(rows))


def test_one_token_rows() -> None:
    shape = StepShape(4)
    seen = views(LAYOUT.pack_rows(shape, [5, 0, 3], leading([5, -1, 3])), shape)
    assert seen.plan_3B.tolist() == [[5, 0, 3, -1], [NO_BOUND] * 4, [5, -1, 3, -1]]
    assert seen.query_start is None and seen.tiles_M2 is None


def test_rows_that_draw_have_a_line_of_their_own() -> None:
    shape = StepShape(4, draws=True)
    inside = Inside([5, -1, -1], [-1, 0, -1])
    assert inside.rows == [5, 0, -1] and inside.count == 2
    seen = views(LAYOUT.pack_rows(shape, [5, 0, 3], inside), shape)
    assert seen.plan_3B.tolist() == [[5, 0, 3, -1], [NO_BOUND] * 4, [5, -1, -1, -1]]
    assert seen.inside_2B is not None
    assert seen.inside_2B.tolist() == [[5, -1, -1, -1], [-1, 0, -1, -1]]
    spans = [Span(3, 9, 1), Span(8, 2, 1), Span(5, 4, 1), Span(0, 0, 7)]
    by_span = inside.by_span([5, 0, 3], spans)
    assert (by_span.leads, by_span.draws) == ([-1, -1, 5, -1], [-1, -1, -1, 0])


def test_prompts_stand_behind_all_one_token_rows() -> None:
    shape = StepShape(4, 3, 64)
    spans = [Span(7, 30, 1), Span(2, 11, 1), Span(0, 5, 20), Span(9, 0, 33)]
    seen = views(LAYOUT.pack_spans(shape, spans, leading([7, -1, -1, 9])), shape)
    assert lines_of(shape, spans) == [0, 1, 4, 5]
    assert seen.plan_3B[0].tolist() == [7, 2, -1, -1, 0, 9, -1]
    assert seen.plan_3B[1].tolist() == [30, 11, 0, 0, 5, 0, 0]
    assert seen.plan_3B[2].tolist() == [7, -1, -1, -1, -1, 9, -1]
    assert seen.query_start is not None and seen.line_T is not None and seen.tiles_M2 is not None
    assert seen.query_start.tolist() == [0, 1, 2, 3, 4, 24, 57, 57]
    assert seen.line_T.tolist() == [4] * 20 + [5] * 33 + [-1] * 11
    used = [[4, 16], [4, 0], [5, 32], [5, 16], [5, 0]]
    assert seen.tiles_M2.tolist() == used + [[4, NOWHERE]] * (LAYOUT.num_tiles(shape) - 5)


@pytest.mark.parametrize("tiles_rows", [False, True])
def test_every_query_is_in_one_tile_and_all_tiles_have_room(tiles_rows: bool) -> None:
    layout = Layout(tile_queries=16, tiles_rows=tiles_rows)
    rng = random.Random(0)
    shape = StepShape(3, 5, 96)
    # The worst that there can be, too: all but one a token more than a tile.
    cases = [[17, 17, 17, 17, 28], [2] * 5, [96]]
    for _ in range(50):
        cuts = sorted(rng.sample(range(2, 95), rng.randrange(5)))
        cases.append([b - a for a, b in itertools.pairwise([0, *cuts, 96]) if b - a > 1])
    for lengths in cases:
        spans = [Span(row, 0, length) for row, length in enumerate(lengths)]
        seen = views(layout.pack_spans(shape, spans, Inside.nobody(len(spans))), shape, layout)
        assert seen.query_start is not None and seen.tiles_M2 is not None
        counts = seen.query_start.diff().tolist()
        assert counts == [1, 1, 1, *lengths, *[0] * (5 - len(lengths))]
        found = [(line, at) for line, at in seen.tiles_M2.tolist() if at != NOWHERE]
        first = 0 if tiles_rows else 3
        expected = {(line, at) for line in range(first, 8) for at in range(0, counts[line], 16)}
        assert len(found) == len(expected) and set(found) == expected


def test_nobody_is_in_a_step_that_is_captured() -> None:
    shape = StepShape(2, 2, 32)
    seen = views(LAYOUT.pack_spans(shape, [], Inside.nobody(0)), shape)
    assert seen.plan_3B.tolist() == [[-1] * 4, [0] * 4, [-1] * 4]
    assert seen.query_start is not None and seen.tiles_M2 is not None and seen.line_T is not None
    assert seen.query_start.tolist() == [0, 1, 2, 2, 2] and seen.line_T.eq(-1).all()
    assert seen.tiles_M2[:, 1].eq(NOWHERE).all()


def test_attention_finds_the_tiles_where_they_are_left() -> None:
    assert backend_file.TILES == TILES
