"""The sampler as the runner uses it: distributions, order of steps, independence of the batch, failures."""

import msgspec
import numpy as np
import pytest
import torch
from scipy import stats
from transformers.generation.logits_process import (
    MinNewTokensLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
)

from slipstream.core.sampling_params import RowSampling
from slipstream.sampling import greedy
from slipstream.sampling import sampler as sampler_module
from slipstream.sampling.base import ALL_MASKED, BAD_LOGITS, OK
from slipstream.sampling.batch import Batch
from slipstream.sampling.history import TokenHistory
from slipstream.sampling.sampler import Sampler
from slipstream.sampling.state import to_device

PROMPT = [1, 2, 3]

# One of every kind of row: each path, each edit, and their mixtures.
MIXED = [
    RowSampling(),
    RowSampling(temperature=1.0),
    RowSampling(temperature=0.7, min_p=0.05),
    RowSampling(temperature=0.9, top_k=5),
    RowSampling(temperature=1.1, top_k=40, top_p=0.9, logprobs=4),
    RowSampling(temperature=0.8, top_p=0.95),
    RowSampling(temperature=3.0, top_p=0.99, min_p=0.001, logprobs=0),
    RowSampling(repetition_penalty=1.3),
    RowSampling(temperature=0.8, presence_penalty=0.6, frequency_penalty=0.4, logprobs=2),
    RowSampling(
        temperature=1.2, top_k=300, logit_bias=((3, 5.0), (9, -100.0)), min_tokens=4, stop_ids=(3, 4)
    ),
    RowSampling(min_tokens=2, stop_ids=(0, 1, 2), logprobs=1),
    RowSampling(temperature=1.0, allowed_ids=tuple(range(20, 90)), bad_ids=(25, 30), prompt_logprobs=1),
    RowSampling(no_repeat_ngram_size=1, repetition_penalty=0.5, logprobs=3),
    RowSampling(
        temperature=0.9,
        no_repeat_ngram_size=2,
        allowed_ids=(3, 5, 9, 50, 52, 54, 57, 58),
        has_processors=True,
    ),
    RowSampling(num_candidates=6, bad_ids=(2, 4), logprobs=1),
    RowSampling(bad_sequences=((7, 8), *((t, 8, t) for t in range(60))), logit_bias=((7, 20.0), (8, 20.0))),
]


class Recorded(Sampler):
    """A sampler and the token buffer that a runner keeps beside it."""

    def __init__(self, *, max_rows, vocab_size, device):
        tokens = torch.zeros(max_rows, 256, dtype=torch.int32, device=device)
        self.record = TokenHistory(tokens, torch.zeros(max_rows, dtype=torch.int64, device=device))
        super().__init__(max_rows=max_rows, vocab_size=vocab_size, device=device, history=self.record)

    def add(self, row, sampling, tokens, *others):
        super().add(row, sampling, tokens, *others)
        self.record.tokens[row, : len(tokens)].copy_(to_device(tokens, torch.int32, self._device))
        self.record.lengths[row].fill_(len(tokens))

    def sample(self, logits_RV, rows, masks=None, *, edit=None):
        output = super().sample(logits_RV, rows, masks, edit=edit)
        rows_R = to_device(rows, torch.int64, self._device)
        length_R = self.record.lengths[rows_R]
        self.record.tokens[rows_R, length_R] = output.token_ids_R.to(torch.int32)
        self.record.lengths[rows_R] = length_R + 1
        return output


def make(vocab, sampled, *, seeds=None, max_rows=64, sample_idx=None):
    sampler = Recorded(max_rows=max_rows, vocab_size=vocab, device="cpu")
    for row, sampling in enumerate(sampled):
        seed = seeds[row] if seeds else 1000 + row
        sampler.add(row, sampling, PROMPT, len(PROMPT), seed, sample_idx[row] if sample_idx else 0)
    return sampler


def logits(rows, vocab, seed=0, scale=3.0):
    """bfloat16 values in float32, as a model gives them: with ties."""
    x = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale
    return x.to(torch.bfloat16).float()


def probabilities(x, s):
    """The definition of a row's distribution, in float64."""
    p = np.exp((x.double().numpy() - x.max().item()) / s.temperature)
    order = np.argsort(-p, kind="stable")[: s.top_k or len(p)]
    share = p[order] / p[order].sum()
    kept = order[(np.cumsum(share) - share < s.top_p) & (share >= s.min_p * share[0])]
    result = np.zeros_like(p)
    result[kept] = p[kept] / p[kept].sum()
    return result


@pytest.mark.parametrize(
    "sampling",
    [
        RowSampling(temperature=1.0),
        RowSampling(temperature=0.5),
        RowSampling(temperature=1.5, top_k=6),
        RowSampling(temperature=1.2, top_p=0.85),
        RowSampling(temperature=1.3, min_p=0.08),
        RowSampling(temperature=1.4, top_k=9, top_p=0.9, min_p=0.04),
    ],
    ids=str,
)
def test_draws_follow_the_distribution(sampling):
    vocab, rows, steps = 16, 50, 120
    x = torch.randn(vocab, generator=torch.Generator().manual_seed(5)) * 1.5
    sampler = make(vocab, [sampling] * rows)
    drawn = [sampler.sample(x.repeat(rows, 1), list(range(rows))).tokens() for _ in range(steps)]
    observed = np.bincount(np.ravel(drawn), minlength=vocab)
    expected = probabilities(x, sampling) * rows * steps
    assert not observed[expected == 0].any()
    kept = expected > 0
    # Seeds are fixed, so the p-value is: a failure is a change of the distribution or of the noise. In 6,000
    # draws a share of 0.2 has a standard error of 0.005; one that is off by 0.03 fails.
    assert stats.chisquare(observed[kept], expected[kept]).pvalue > 1e-3
    # Successive draws of a row are independent: pairs follow the product distribution.
    first, second = np.array(drawn[:-1]).ravel(), np.array(drawn[1:]).ravel()
    likeliest = int(expected.argmax())
    both = np.mean((first == likeliest) & (second == likeliest))
    p = expected[likeliest] / (rows * steps)
    assert abs(both - p * p) < 4 * np.sqrt(p * p / len(first))


@pytest.mark.parametrize("vocab", [331, 4099])
def test_a_row_does_not_depend_on_its_batch(vocab):
    """Tokens and logprobs are bit-equal alone, in a batch of 32, and in another order."""
    sampled = [MIXED[i % len(MIXED)] for i in range(32)]
    together, shuffled = make(vocab, sampled), make(vocab, sampled)
    alone = [make(vocab, sampled) for _ in range(len(MIXED))]
    order = np.random.default_rng(0).permutation(32).tolist()
    seen = set()
    for step in range(6):
        x = logits(32, vocab, seed=step)
        a = together.sample(x.clone(), list(range(32)))
        b = shuffled.sample(x[order], order)
        assert [a.tokens()[i] for i in order] == b.tokens()
        assert [a.logprobs_by_row().get(i) for i in order] == [
            b.logprobs_by_row().get(place) for place in range(32)
        ]
        for row, single in enumerate(alone):
            c = single.sample(x[row : row + 1].clone(), [row])
            assert c.tokens() == [a.tokens()[row]]
            assert c.logprobs_by_row().get(0) == a.logprobs_by_row().get(row)
        seen.update(a.tokens())
    assert len(seen) > 40, "the rows drew too few different tokens to prove anything"


def test_batches_that_change_from_step_to_step_give_the_same_tokens():
    vocab, rows = 509, 8
    sampled = [MIXED[i] for i in range(rows)]
    whole, partial = make(vocab, sampled), make(vocab, sampled)
    rng = np.random.default_rng(3)
    streams = {row: [] for row in range(rows)}
    by_position = [logits(rows, vocab, seed=step) for step in range(12)]
    for x in by_position:
        for row, token in enumerate(whole.sample(x.clone(), list(range(rows))).tokens()):
            streams[row].append(token)
    got = {row: [] for row in range(rows)}
    while any(len(tokens) < 12 for tokens in got.values()):
        left = [row for row in range(rows) if len(got[row]) < 12]
        chosen = [row for row in left if rng.random() < 0.6] or left[:1]
        x = torch.stack([by_position[len(got[row])][row] for row in chosen])
        for row, token in zip(chosen, partial.sample(x, chosen).tokens(), strict=True):
            got[row].append(token)
    assert got == streams


def test_seeds_and_samples():
    vocab = 1000
    flat = torch.zeros(4, vocab)
    hot = RowSampling(temperature=1.0)

    def run(seeds, idx):
        sampler = make(vocab, [hot] * 4, seeds=seeds, sample_idx=idx)
        return np.array([sampler.sample(flat.clone(), [0, 1, 2, 3]).tokens() for _ in range(20)]).T.tolist()

    same = run([7, 7, 8, 2**64 - 1], [0, 0, 0, 0])
    assert same == run([7, 7, 8, 2**64 - 1], [0, 0, 0, 0]), "reproducible"
    assert same[0] == same[1] and same[0] != same[2] and same[2] != same[3]
    samples = run([7, 7, 7, 7], [0, 1, 2, 3])
    assert samples[0] == same[0], "sample 0 of n is the request with n = 1"
    assert len({tuple(stream) for stream in samples}) == 4
    assert all(len(set(stream)) > 15 for stream in samples), "positions draw different noise"


def test_greedy_takes_one_maximum_and_nothing_else(monkeypatch):
    calls = []
    real = sampler_module.draw_greatest
    monkeypatch.setattr(sampler_module, "draw_greatest", lambda x: calls.append(1) or real(x))
    for name in ("_draw", "pack_logprobs"):
        monkeypatch.setattr(sampler_module, name, lambda *a, **k: pytest.fail("not a greedy step"))
    monkeypatch.setattr(Batch, "uniform", lambda *a: pytest.fail("greedy needs no noise"))
    vocab = 5000
    # Filters that cannot change the greedy choice, and min_tokens that are long passed.
    sampled = [RowSampling(), RowSampling(top_k=3, top_p=0.2), RowSampling(min_tokens=0, stop_ids=(4,))]
    sampler = make(vocab, sampled)
    x = logits(3, vocab)
    given = x.clone()
    output = sampler.sample(x, [0, 1, 2])
    assert output.tokens() == given.argmax(-1).tolist() and output.statuses() == [OK] * 3
    assert len(calls) == 1
    assert torch.equal(x, given), "a greedy step leaves the logits alone"
    assert sampler._tables.num_slots == 0, "no table without a penalty"


def test_greedy_path_equals_the_general_path():
    vocab = 3001
    sampler, general = make(vocab, [RowSampling()] * 5), make(vocab, [RowSampling()] * 5)
    rows = list(range(5))
    for step in range(4):
        x = logits(5, vocab, seed=step)
        x[0] = 2.5
        allowed = torch.ones(5, vocab, dtype=torch.bool)
        assert sampler.sample(x.clone(), rows).tokens() == general.sample(x, rows, masks=allowed).tokens()


def test_a_row_past_its_min_tokens_returns_to_the_greedy_path(monkeypatch):
    calls = []
    real = sampler_module.draw_greatest
    monkeypatch.setattr(sampler_module, "draw_greatest", lambda x: calls.append(1) or real(x))
    sampler = make(50, [RowSampling(min_tokens=3, stop_ids=(7,))])
    x = torch.zeros(1, 50)
    x[0, 7] = 1.0
    tokens = [sampler.sample(x.clone(), [0]).tokens()[0] for _ in range(5)]
    assert tokens == [0, 0, 0, 7, 7] and len(calls) == 2


def test_min_tokens_is_transformers():
    vocab, prompt = 60, torch.tensor([PROMPT])
    processor = MinNewTokensLengthLogitsProcessor(3, 4, [5, 9], device="cpu")
    sampler = make(vocab, [RowSampling(min_tokens=4, stop_ids=(5, 9))])
    ids = prompt
    for step in range(7):
        x = logits(1, vocab, seed=step)
        x[0, [5, 9]] += 6
        expected = processor(ids, x.clone()).argmax(-1)
        assert sampler.sample(x.clone(), [0]).tokens() == expected.tolist()
        ids = torch.cat((ids, expected[None]), dim=1)
    assert 5 in ids[0, 3 + 4 :] or 9 in ids[0, 3 + 4 :], "the stop ids would have won without the mask"


def test_bias_and_repetition_are_transformers_in_its_order():
    vocab = 200
    bias, penalty = ((4, 3.0), (8, -7.5), (150, 6.0)), 1.5
    sampler = make(vocab, [RowSampling(logit_bias=bias, repetition_penalty=penalty)])
    add_bias = SequenceBiasLogitsProcessor([[[token], value] for token, value in bias])
    repeat = RepetitionPenaltyLogitsProcessor(penalty)
    ids = torch.tensor([PROMPT])
    for step in range(15):
        x = torch.randn(1, vocab, generator=torch.Generator().manual_seed(step)) * 3
        expected = repeat(ids, add_bias(ids, x.clone()))
        edited = x.clone()
        tokens = sampler.sample(edited, [0]).tokens()
        # The same float32 operations on the same numbers.
        assert torch.equal(edited, expected)
        assert tokens == expected.argmax(-1).tolist()
        ids = torch.cat((ids, torch.tensor([tokens])), dim=1)


def test_presence_and_frequency_follow_the_formula_as_tokens_are_drawn():
    vocab = 40
    sampler = make(vocab, [RowSampling(temperature=1.0, presence_penalty=0.8, frequency_penalty=0.3)])
    counts = torch.zeros(vocab)
    for step in range(30):
        x = torch.randn(1, vocab, generator=torch.Generator().manual_seed(step))
        edited = x.clone()
        token = sampler.sample(edited, [0]).tokens()[0]
        # Two float32 subtractions in either order.
        torch.testing.assert_close(edited[0], x[0] - 0.8 * (counts > 0) - 0.3 * counts, rtol=0, atol=4e-6)
        counts[token] += 1
    assert counts.max() > 1


def test_logprobs_are_raw_whatever_the_row_does_to_its_logits():
    vocab = 300
    plain = RowSampling(logprobs=5)
    edited = RowSampling(
        temperature=0.5,
        top_k=2,
        repetition_penalty=2.0,
        logit_bias=((7, 50.0),),
        min_tokens=9,
        stop_ids=(1,),
        logprobs=5,
    )
    x = logits(1, vocab).repeat(2, 1)
    expected = x[0].double().log_softmax(-1)
    output = make(vocab, [plain, edited]).sample(x, [0, 1])
    assert output.tokens()[1] == 7
    for i in range(2):
        entry = output.logprobs_by_row().get(i)
        # float32 exp in the normaliser.
        assert entry.logprob == pytest.approx(expected[entry.token_id].item(), abs=1e-6)
    assert output.logprobs_by_row().get(0).top == output.logprobs_by_row().get(1).top


@pytest.mark.parametrize("poison", ["nan", "inf", "all masked", "one nan"])
def test_a_failing_row_leaves_its_neighbours_alone(poison):
    vocab, rows = 777, list(range(len(MIXED)))
    for victim in range(len(MIXED)):
        healthy, failing = make(vocab, MIXED), make(vocab, MIXED)
        for step in range(2):
            x = logits(len(MIXED), vocab, seed=step)
            y = x.clone()
            if poison == "nan":
                y[victim] = torch.nan
            elif poison == "inf":
                y[victim, 5] = torch.inf
            elif poison == "one nan":
                y[victim, vocab - 1] = torch.nan
            else:
                y[victim] = -torch.inf
            a, b = healthy.sample(x, rows), failing.sample(y, rows)
            expected_status = ALL_MASKED if poison == "all masked" else BAD_LOGITS
            assert b.statuses() == [expected_status if i == victim else OK for i in rows]
            assert b.tokens()[victim] == 0 and b.logprobs_by_row().get(victim) is None
            others = [i for i in rows if i != victim]
            assert [a.tokens()[i] for i in others] == [b.tokens()[i] for i in others]
            assert [a.logprobs_by_row().get(i) for i in others] == [
                b.logprobs_by_row().get(i) for i in others
            ]


def test_masks_allow_what_they_say():
    vocab, rows = 130, list(range(len(MIXED)))
    sampler = make(vocab, MIXED)
    allowed = torch.zeros(len(MIXED), vocab, dtype=torch.bool)
    allowed[:, 50:60] = True
    allowed[2] = False
    for step in range(5):
        output = sampler.sample(logits(len(MIXED), vocab, seed=step), rows, masks=allowed)
        assert output.statuses() == [ALL_MASKED if i == 2 else OK for i in rows]
        assert all(50 <= t < 60 for i, t in enumerate(output.tokens()) if i != 2)


def test_min_tokens_over_every_id_masks_the_row():
    output = make(5, [RowSampling(min_tokens=1, stop_ids=(0, 1, 2, 3, 4)), RowSampling()]).sample(
        torch.zeros(2, 5), [0, 1]
    )
    assert output.statuses() == [ALL_MASKED, OK]


def test_readmission_continues_as_if_uninterrupted():
    vocab, steps, cut = 211, 12, 5
    rows = list(range(len(MIXED)))
    straight, preempted = make(vocab, MIXED), make(vocab, MIXED)
    by_step = [logits(len(MIXED), vocab, seed=step, scale=1.0) for step in range(steps)]
    expected = [straight.sample(x.clone(), rows).tokens() for x in by_step]
    got = [preempted.sample(x.clone(), rows).tokens() for x in by_step[:cut]]
    # Everyone leaves and comes back in another row, with what it generated as part of its tokens.
    for row in rows:
        preempted.remove(row)
    moved = [row + 20 for row in reversed(rows)]
    for row, sampling in enumerate(MIXED):
        tokens = PROMPT + [step_tokens[row] for step_tokens in got]
        preempted.add(moved[row], sampling, tokens, len(PROMPT), 1000 + row, 0)
    got += [preempted.sample(x.clone(), moved).tokens() for x in by_step[cut:]]
    assert got == expected


def test_a_freed_row_may_be_reissued_at_once():
    sampler = make(100, [RowSampling(temperature=1.0, frequency_penalty=90.0)], max_rows=1)
    x = torch.zeros(1, 100)
    sampler.sample(x.clone(), [0])
    sampler.remove(0)
    sampler.add(0, RowSampling(frequency_penalty=1.0), PROMPT, 3, 5, 0)
    assert [sampler.sample(x.clone(), [0]).tokens() for _ in range(2)] == [[0], [1]]


def test_penalty_tables_belong_to_rows_with_penalties():
    sampler = make(100, [RowSampling(), RowSampling(temperature=1.0), RowSampling(presence_penalty=1.0)])
    assert sampler._tables.num_slots == 4
    assert list(sampler._slots) == [2]


def test_no_rows_no_tokens():
    output = make(100, []).sample(torch.zeros(0, 100), [])
    assert output.tokens() == [] and output.statuses() == []


def test_logits_need_not_be_contiguous():
    wide = logits(2, 600)
    narrow = wide[:, :300]
    sampled = [RowSampling(repetition_penalty=1.5), RowSampling(temperature=1.0)]
    expected = make(300, sampled).sample(narrow.clone(), [0, 1]).tokens()
    assert make(300, sampled).sample(narrow, [0, 1]).tokens() == expected


def test_mixed_covers_every_field_of_a_row():
    """A field added to RowSampling joins the tables above."""
    for field in msgspec.structs.fields(RowSampling):
        assert any(getattr(s, field.name) != field.default for s in MIXED), field.name


# Two devices' exponentials differ in the last bit, which moves a boundary between tokens by 1e-7 of the mass:
# seeds for which every draw is farther than NUDGE from every boundary, so that both devices draw the same.
NUDGE = 2e-6
P25 = [RowSampling(temperature=0.8, top_p=0.95, repetition_penalty=1.1, logprobs=5)] * 9
CLEAR = {"mixed": (MIXED, 1100), "all sampled with logprobs": (P25, 1000)}


def inputs_of(sampled, vocab=32_003, steps=6):
    return [logits(len(sampled), vocab, seed=step) for step in range(steps)]


def nudged(sampled, seed, sign):
    """Run rows whose noise, top-p and min-p are off by NUDGE; returns the tokens of each step."""
    moved = [
        msgspec.structs.replace(
            s,
            top_p=min(1.0, s.top_p * (1 + sign * NUDGE)) if s.top_p < 1 else 1.0,
            min_p=s.min_p * (1 + sign * NUDGE),
        )
        for s in sampled
    ]
    inputs = inputs_of(sampled)
    sampler = make(inputs[0].shape[1], moved, seeds=[seed + row for row in range(len(sampled))])
    real = Batch.uniform
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Batch, "uniform", lambda *a: (real(*a) + sign * NUDGE).clamp(0, 1 - 2**-53))
        return [sampler.sample(x, list(range(len(sampled)))).tokens() for x in inputs]


@pytest.mark.parametrize("kind", CLEAR)
def test_draws_to_compare_devices_by_are_clear(kind):
    exact = nudged(*CLEAR[kind], 0)
    assert nudged(*CLEAR[kind], 1) == exact and nudged(*CLEAR[kind], -1) == exact


@pytest.mark.gpu
@pytest.mark.parametrize("kind", CLEAR)
def test_a_step_never_waits_for_the_device(kind):
    sampled, seed = CLEAR[kind]
    rows, inputs = list(range(len(sampled))), inputs_of(sampled)
    vocab = inputs[0].shape[1]
    on_gpu = Recorded(max_rows=32, vocab_size=vocab, device="cuda")
    on_cpu = make(vocab, sampled, max_rows=32, seeds=[seed + row for row in rows])
    on_device = [x.cuda() for x in inputs]
    torch.cuda.synchronize()
    outputs = []
    torch.cuda.set_sync_debug_mode("error")
    try:
        for row, sampling in enumerate(sampled):
            on_gpu.add(row, sampling, PROMPT, len(PROMPT), seed + row, 0)
        for x in on_device:
            outputs.append(on_gpu.sample(x, rows))
            outputs[-1].start_copy()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for given, x in zip(outputs, inputs, strict=True):
        expected = on_cpu.sample(x, rows)
        assert given.tokens() == expected.tokens()
        assert given.statuses() == expected.statuses()
        found, wanted = given.logprobs_by_row(), expected.logprobs_by_row()
        assert found.keys() == wanted.keys() and found
        for row, one in found.items():
            other = wanted[row]
            assert (one.token_id, one.rank) == (other.token_id, other.rank)
            assert [token for token, _ in one.top] == [token for token, _ in other.top]
            # The normaliser is a sum of float32 exponentials.
            assert one.logprob == pytest.approx(other.logprob, abs=1e-6)
            assert [v for _, v in one.top] == pytest.approx([v for _, v in other.top], abs=1e-6)


def test_outputs_can_be_copied_ahead():
    sampler = make(100, [RowSampling(logprobs=1)])
    output = sampler.sample(logits(1, 100), [0])
    output.start_copy()
    copy = output._copy
    output.start_copy()
    assert output._copy is copy, "one copy, of everything"
    assert output.logprobs_by_row().get(0).token_id == output.tokens()[0]


def test_greedy_on_the_host_and_by_tensors_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(6, 300, generator=torch.Generator().manual_seed(3))
    logits[1, 40], logits[2, 7], logits[3] = float("nan"), float("inf"), -float("inf")
    logits[4, 250] = logits[4, 20] = 9.0
    host = greedy.draw_greatest(logits)
    monkeypatch.setattr(greedy, "find_argmax", lambda: None)
    plain = greedy.draw_greatest(logits)
    assert host.tokens() == plain.tokens() and host.tokens()[4] == 20
    assert host.statuses() == plain.statuses() == [OK, BAD_LOGITS, BAD_LOGITS, ALL_MASKED, OK, OK]
