"""Does every registered op agree with its schema and its fake, and with the plain function beside it?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from slipstream.kernels.balanced_decode import balanced_decode_op
from slipstream.kernels.decode_borders import decode_borders_op
from slipstream.kernels.gelu_and_mul import gelu_and_mul, gelu_and_mul_op
from slipstream.kernels.paged_attention import paged_attention, paged_attention_op
from slipstream.kernels.paged_decode import NUM_COUNTERS, paged_decode_op
from slipstream.kernels.paged_prefill import paged_prefill_op
from slipstream.kernels.rms_norm import add_rms_norm, add_rms_norm_op, rms_norm, rms_norm_op
from slipstream.kernels.rotary import rotary, rotary_op, rotary_table
from slipstream.kernels.silu_and_mul import silu_and_mul, silu_and_mul_op
from slipstream.kernels.store_kv import store_kv_op
from slipstream.kernels.store_slots import store_slots_op


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


X, WEIGHT = draw(5, 16), draw(16, seed=1)
HEADS, TABLE = draw(5, 3, 8), rotary_table(draw(5, 4, seed=2))
PAGED = (
    draw(3, 4, 8),
    draw(4, 2, 4, 2, 8, seed=3),
    [torch.tensor([0, 2, 1, 3])],
    [torch.zeros(2, 1, 1, 8)],
    [torch.tensor([7, 15])],
    [0, 2, 1, 0, 8, 0],
    0.3,
    0,
    0.0,
)
OPS = {
    "rms_norm": (rms_norm_op, rms_norm, (X, WEIGHT, 1e-6)),
    "add_rms_norm": (add_rms_norm_op, add_rms_norm, (X, draw(5, 16, seed=4), WEIGHT, 1e-6)),
    "rotary": (rotary_op, rotary, (HEADS, TABLE, False)),
    "silu_and_mul": (silu_and_mul_op, silu_and_mul, (X,)),
    "gelu_and_mul": (gelu_and_mul_op, gelu_and_mul, (X, "tanh")),
    "paged_attention": (paged_attention_op, paged_attention, (PAGED[0][:2], *PAGED[1:])),
}


@pytest.mark.parametrize("name", OPS)
def test_op_agrees_with_its_function(name: str) -> None:
    op, function, arguments = OPS[name]
    torch.testing.assert_close(op(*arguments), function(*arguments), rtol=0, atol=0)


@pytest.mark.parametrize("name", OPS)
def test_op_keeps_its_schema_and_fake(name: str) -> None:
    op, _, arguments = OPS[name]
    torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))


def test_store_op_declares_what_it_writes() -> None:
    slots = torch.tensor([3, 0]), torch.tensor([1, 2])
    arguments = (draw(2, 2, 8), draw(2, 2, 8, seed=1), draw(4, 2, 4, 2, 8), *slots)
    torch.library.opcheck(store_kv_op, arguments, test_utils=("test_schema", "test_faketensor"))


def test_attention_over_pages_declares_what_it_writes() -> None:
    pages, table = draw(4, 2, 4, 2, 8, seed=3), torch.tensor([[1, 2], [3, 0]], dtype=torch.int32)
    lens, start = torch.tensor([7, 3]), torch.tensor([0, 2, 5])
    counters = torch.zeros(NUM_COUNTERS, dtype=torch.int32)
    decode = (draw(2, 4, 8), pages, table, lens, torch.empty(2, 4, 8), counters, 8, 0.3, 0, 0.0)
    cut = (lens, None, 2, 4, 0, 6)
    borders = decode_borders_op(*cut)
    balanced = (draw(2, 4, 8), pages, table, lens, borders, torch.empty(2, 4, 8), counters, 0.3, 0, 0.0)
    tiles = torch.tensor([[0, 0], [1, 0]], dtype=torch.int32)
    prefill = (draw(5, 4, 8), pages, table, lens, start, tiles, torch.empty(5, 4, 8), 0.3, 2, 5.0)
    slots = (draw(3, 2, 8), draw(3, 2, 8), pages, torch.tensor([5, -1, 9]))
    calls = (
        (paged_decode_op, decode),
        (decode_borders_op, cut),
        (balanced_decode_op, balanced),
        (paged_prefill_op, prefill),
        (store_slots_op, slots),
    )
    for op, arguments in calls:
        torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))


def test_an_export_records_the_op() -> None:
    class Norm(torch.nn.Module):
        def forward(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            return rms_norm_op(x, weight, 1e-6)

    graph = torch.export.export(Norm(), (X, WEIGHT)).graph
    assert [str(node.target) for node in graph.nodes if node.op == "call_function"] == [
        "slipstream.rms_norm.default"
    ]


def test_names_are_unique() -> None:
    ops: list[Callable[..., Any]] = [op for op, _, _ in OPS.values()]
    assert len({str(op) for op in ops}) == len(OPS)
