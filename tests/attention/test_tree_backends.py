"""Does every attention backend that states trees serve them, and is a plan refused by every other one?"""

from __future__ import annotations

import math

import pytest
import torch

from slipstream.attention import torch_reference
from slipstream.attention.base import AttentionBackend, AttentionSpec
from slipstream.attention.registry import BACKENDS, DeviceFacts, require_trees
from slipstream.core.batch import ForwardBatch
from slipstream.core.cache_group import CacheGroup
from slipstream.core.errors import UnsupportedError
from tests.kernels.tree_steps import Row, TreeStep, chain, random_tree, star

# As in `test_conformance.py`.
TOLERANCE = 2e-5
GROUPS = [CacheGroup(layers=(0,), kind="full", heads=2, head_dim=64, block_tokens=16)]
ROWS = (
    Row(1, 9),
    Row(1, 40, (-1,)),
    Row(5, 21),
    Row(7, 130, random_tree(7, seed=1), bad=(2,)),
    Row(9, 9, star(9)),
    Row(64, 101, random_tree(64, seed=2, roots=2), bad=(5, 39)),
)
WITH_TREES = [name for name in BACKENDS if BACKENDS.get(name).capability.tree]


@pytest.fixture(params=WITH_TREES)
def backend(request: pytest.FixtureRequest) -> AttentionBackend:
    return BACKENDS.get(request.param)()


def run(step: TreeStep, backend: AttentionBackend) -> torch.Tensor:
    """Run a backend over the step's own tokens, whose K and V it has to store first."""
    places, keys, values, row_of = [], [], [], []
    for number, (row, kv) in enumerate(zip(step.rows, step.kv, strict=True)):
        span = range(row.length - row.count, row.length)
        pages = step.table[number].tolist()
        places += [pages[p // step.page] * step.page + p % step.page for p in span]
        keys.append(kv[0, span.start :])
        values.append(kv[1, span.start :])
        row_of += [number] * row.count
    pages = step.pages[:, None].clone()
    slots = torch.tensor(places)
    pages[slots // step.page, 0, :, slots % step.page] = math.nan
    counts = [row.count for row in step.rows]
    lengths = [row.length for row in step.rows]
    plan = backend.plan(query_lens=counts, max_seq_lens=[length + 3 for length in lengths])
    # A lone token has no use for bits.
    plan.tree_T = torch.cat((torch.zeros(2, dtype=torch.int64), step.tree[2:]))
    batch = ForwardBatch(
        token_ids_T=torch.zeros(len(places), dtype=torch.int64),
        positions_kT=torch.zeros(1, len(places), dtype=torch.int64),
        row_of_T=torch.tensor(row_of),
        query_start=torch.tensor([0, *counts]).cumsum(0),
        seq_lens=torch.tensor(lengths),
        slot_mapping_T=[slots],
        block_table=[step.table],
        kv_pages=[pages],
        layer_place=[(0, 0)],
        attention_plan=plan,
        logits_idx=torch.empty(0, dtype=torch.int64),
    )
    spec = AttentionSpec(
        layer_idx=0,
        scale=step.size**-0.5,
        num_kv_heads=step.kv_heads,
        head_dim=step.size,
        window=step.window,
        softcap=step.softcap,
    )
    return plan.run(step.q, torch.cat(keys), torch.cat(values), batch, spec)


def check(step: TreeStep, backend: AttentionBackend) -> None:
    given = run(step, backend).double()
    assert given[:2].isfinite().all()
    torch.testing.assert_close(given[2:], step.expected()[2:], rtol=0, atol=TOLERANCE, equal_nan=True)


@pytest.mark.parametrize("window", [0, 1, 6, 50])
@pytest.mark.parametrize("page", [8, 16, 64])
def test_each_token_sees_its_path(backend: AttentionBackend, page: int, window: int) -> None:
    check(TreeStep(ROWS, page=page, window=window), backend)


@pytest.mark.parametrize("softcap", [0.5, 30.0])
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (6, 2), (8, 1)])
def test_heads_and_soft_caps(backend: AttentionBackend, heads: int, kv_heads: int, softcap: float) -> None:
    check(TreeStep(ROWS, heads=heads, kv_heads=kv_heads, softcap=softcap), backend)


@pytest.mark.parametrize("limit", [1, 1 << 15, 1 << 30])
def test_pieces_of_any_size_agree(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    monkeypatch.setattr(torch_reference, "MAX_GATHER_BYTES", limit)
    check(TreeStep(ROWS, window=20), torch_reference.TorchReference())


def test_a_chain_is_an_ordinary_span(backend: AttentionBackend) -> None:
    ones = (Row(1, 3), Row(1, 8))
    given, plain = (
        run(TreeStep((*ones, Row(20, 90, parents)), window=11), backend) for parents in (chain(20), None)
    )
    torch.testing.assert_close(given, plain, rtol=0, atol=1e-5)


def test_who_serves_trees() -> None:
    assert WITH_TREES == ["torch", "triton"]
    for name in BACKENDS:
        row = BACKENDS.get(name)
        for device, others in (("cuda:0", "'triton' or 'torch'"), ("cpu", "'torch'")):
            if name in WITH_TREES or device.partition(":")[0] not in row.capability.devices:
                continue
            advice = f"{name!r} serves no trees of drafts; on .*, attn_backend={others} does"
            with pytest.raises(UnsupportedError, match=advice):
                require_trees(object.__new__(row), DeviceFacts(device=device), GROUPS)
    for name in WITH_TREES:
        require_trees(BACKENDS.get(name)(), DeviceFacts(device="cpu"), GROUPS)
