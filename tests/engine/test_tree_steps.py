"""Does a token of a tree of drafts get the logits of its path, run token after token?

Plans by hand through the runner: a prompt is computed, its tokens are drafted into the row's buffer, and one
span runs them all. Each path then runs in a row of its own, as an ordinary span.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from slipstream.attention.torch_reference import TorchReference
from slipstream.core.errors import EngineError, UnsupportedError
from slipstream.core.plan import RequestInit, Span, StepPlan, StepResult
from slipstream.core.sampling_params import RowSampling
from slipstream.engine.assembly import assemble
from slipstream.engine.config import EngineConfig
from slipstream.engine.host_rows import HostRows
from slipstream.engine.rows import Rows
from slipstream.engine.runner import Runner
from slipstream.kernels.tree_masks import tree_of
from tests.engine.tiny import one_thread, prompt_ids, tiny_gemma3, tiny_llama, write_folder
from tests.kernels.tree_steps import Parents, chain, path_of, random_tree, star

# Behind a path, so that it is never a row of one token, whose span would have to come first.
FILLER = 300
# Logits of up to about 100 in float32, summed in another order; another path's are off by whole units.
TOLERANCE = 2e-3


@pytest.fixture(scope="module", autouse=True)
def single_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module", params=[tiny_llama, tiny_gemma3], ids=["llama", "gemma3"])
def runner(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Runner:
    folder = write_folder(request.param(), tmp_path_factory.mktemp("model"))
    runner = assemble(EngineConfig(model=folder, max_batch_size=4, attn_backend="torch")).engine.runner
    assert isinstance(runner, Runner)
    return runner


def init(runner: Runner, row: int, tokens: list[int], *, computed: int = 0) -> RequestInit:
    """Return a row with four pages of its own per group."""
    num_groups = len(runner.groups)
    blocks = [[1 + (row * num_groups + group) * 4 + i for i in range(4)] for group in range(num_groups)]
    sampling = RowSampling()
    return RequestInit(row, f"r{row}", tokens, len(tokens), computed, blocks, sampling, 1, 0)


def execute(runner: Runner, plan: StepPlan) -> StepResult:
    handle = runner.launch(plan)
    runner.sample(handle)
    result = runner.collect(handle)
    assert not result.row_errors
    return result


def logits_of(runner: Runner, prompt: list[int], drafts: list[int], parents: Parents | None) -> np.ndarray:
    """Return the logits of each drafted token, in a step beside a row of one token and an ordinary span."""
    start, count = len(prompt), len(drafts)
    rows = [init(runner, 0, prompt), init(runner, 1, prompt_ids(9, seed=1)), init(runner, 2, prompt)]
    spans = [Span(row, 0, len(rows[row].tokens)) for row in (1, 0, 2)]
    execute(runner, StepPlan(0, added=rows, spans=spans, sample=[1, 2]))
    rows[2] = init(runner, 2, prompt_ids(30, seed=2))
    plan = StepPlan(
        1,
        removed=[2],
        added=rows[2:],
        tokens=[(0, start, drafts)],
        spans=[Span(1, 9, 1), Span(0, start, count, parents=parents), Span(2, 0, 30)],
        sample=[1, 2],
        logits=[(0, start, count, "context_logits")],
    )
    ((kind, first, values),) = execute(runner, plan).extras[0]
    execute(runner, StepPlan(2, removed=[0, 1, 2]))
    assert (kind, first, len(values)) == ("context_logits", start, count)
    return values


@pytest.mark.parametrize(
    "parents",
    [random_tree(14, seed=3), random_tree(40, seed=4, roots=3), star(8)],
    ids=["tree", "forest", "star"],
)
def test_each_token_gets_the_logits_of_its_path(runner: Runner, parents: Parents) -> None:
    prompt, drafts = prompt_ids(21, seed=5), prompt_ids(len(parents), seed=6)
    given = logits_of(runner, prompt, drafts, parents)
    for leaf in set(range(len(parents))) - set(parents):
        path = path_of(parents, leaf)
        alone = logits_of(runner, prompt, [drafts[i] for i in path] + [FILLER], None)[: len(path)]
        np.testing.assert_allclose(given[path], alone, rtol=0, atol=TOLERANCE)
    in_order = logits_of(runner, prompt, drafts, None)
    assert float(np.abs(given - in_order).max()) > 100 * TOLERANCE


def test_a_chain_is_an_ordinary_span(runner: Runner) -> None:
    prompt, drafts = prompt_ids(21, seed=7), prompt_ids(16, seed=8)
    given, plain = (logits_of(runner, prompt, drafts, parents) for parents in (chain(16), None))
    np.testing.assert_allclose(given, plain, rtol=0, atol=TOLERANCE)


def test_a_lone_token_of_a_tree_is_sampled_like_any(runner: Runner) -> None:
    found: list[Any] = []
    for parents in ((-1,), None):
        prompt = prompt_ids(12, seed=9)
        added = [init(runner, 3, prompt)]
        execute(runner, StepPlan(0, added=added, spans=[Span(3, 0, 12)], sample=[3]))
        plan = StepPlan(1, spans=[Span(3, 12, 1, parents=parents)], sample=[3])
        found.append(execute(runner, plan).tokens)
        execute(runner, StepPlan(2, removed=[3]))
    assert found[0] == found[1] and len(found[0][3]) == 1


@pytest.mark.parametrize(
    ("span", "error", "match"),
    [
        (Span(0, 3, 2, parents=(-1,)), EngineError, "row 0 has 2 tokens and 1 parents"),
        (Span(0, 3, 2, parents=(-1, 1)), EngineError, r"row 0 .*parents\[1\]=1"),
        (Span(0, 3, 1, parents=(0,)), EngineError, r"row 0 .*parents\[0\]=0"),
        (
            Span(0, 3, 2, parents=(-1, 0)),
            UnsupportedError,
            "to be sampled",
        ),
        (Span(0, 3, 2, causal=False), UnsupportedError, "non-causal"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_changes(
    runner: Runner, span: Span, error: type[Exception], match: str
) -> None:
    before = runner.rows.lengths.clone()
    with pytest.raises(error, match=match):
        runner.launch(StepPlan(0, added=[init(runner, 0, [5, 6, 7])], spans=[span], sample=[0]))
    assert torch.equal(runner.rows.lengths, before)


class Plain(TorchReference):
    capability = dataclasses.replace(TorchReference.capability, tree=False)


def test_a_backend_without_trees_refuses_the_plan(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "backend", Plain())
    plan = StepPlan(0, added=[init(runner, 0, [5, 6, 7])], spans=[Span(0, 0, 3, parents=(-1, 0, 0))])
    with pytest.raises(UnsupportedError, match="no trees of drafts; on cpu, attn_backend='torch' does"):
        runner.launch(plan)


@pytest.mark.parametrize("seed", range(4))
def test_positions_follow_depths_and_slots_the_order(seed: int) -> None:
    """On any device and on the host alike; steps without trees carry nothing."""
    rng = random.Random(seed)
    sizes = {"max_rows": 3, "max_seq_len": 200, "num_groups": 2, "block_tokens": 4}
    starts, counts = [rng.randint(0, 40) for _ in range(3)], [1, rng.randint(2, 60), rng.randint(2, 60)]
    pages = [rng.sample(range(500), 30) for _ in range(2)]
    added = [
        RequestInit(row, str(row), list(range(start + count)), 1, 0, pages, RowSampling(), 0, 0)
        for row, (start, count) in enumerate(zip(starts, counts, strict=True))
    ]
    parents = random_tree(counts[2], seed=seed, roots=2)
    spans = [Span(row, start, count) for row, (start, count) in enumerate(zip(starts, counts, strict=True))]
    grown = [*spans[:2], Span(2, starts[2], counts[2], parents=parents)]
    for kind in (Rows, HostRows):
        rows = kind(**sizes, device=torch.device("cpu"))
        rows.apply(StepPlan(0, added=added))
        plain, given = rows.inputs(spans), rows.inputs(grown)
        assert plain.tree_T is None and given.tree_T is not None
        first, tree = sum(counts[:2]), tree_of(parents)
        assert given.tree_T.tolist() == [0] * first + list(tree.bits)
        assert given.positions_T[first:].tolist() == [starts[2] + depth for depth in tree.depths]
        assert torch.equal(given.positions_T[:first], plain.positions_T[:first])
        for name in ("slots_GT", "token_ids_T", "row_of_T", "seq_lens", "query_start", "block_table_GBM"):
            assert torch.equal(getattr(given, name), getattr(plain, name)), name
