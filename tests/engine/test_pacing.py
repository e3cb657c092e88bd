"""Are chunks as long as the readers of other answers can bear? Times are invented, so they are exact."""

from __future__ import annotations

import random

import pytest
from fake_runner import Replica, full

from slipstream.core.errors import ConfigError
from slipstream.engine.config import EngineConfig, SchedulerConfig
from slipstream.engine.pacing import Pacing

DECODE_S = 0.007
OVERHEAD_S = 0.001
TOKEN_S = 20e-6


def step_time(num_decodes: int, num_prefill_tokens: int) -> float:
    """A device on which a step with prompts costs a little more even if they are short."""
    overhead = OVERHEAD_S if num_prefill_tokens else 0.0
    return (DECODE_S if num_decodes else 0.0) + overhead + TOKEN_S * num_prefill_tokens


def learn(pacing: Pacing, *, num_decodes: int, num_prompts: int, num_steps: int = 20) -> int:
    """Let every step run as much as is allowed; returns the last chunk."""
    pacing.observe(num_decodes=num_decodes, num_prefill_tokens=0, seconds=step_time(num_decodes, 0))
    chunk = 0
    for _ in range(num_steps):
        chunk = pacing.budget(num_decodes=num_decodes, num_prompts=num_prompts) or 0
        seconds = step_time(num_decodes, chunk)
        pacing.observe(num_decodes=num_decodes, num_prefill_tokens=chunk, seconds=seconds)
    return chunk


@pytest.mark.parametrize("stretch", [1.5, 2.0, 4.0])
def test_a_step_with_prompts_takes_the_time_that_is_allowed(stretch: float) -> None:
    chunk = learn(Pacing(max_decode_stretch=stretch, min_chunk=16), num_decodes=32, num_prompts=1)
    assert step_time(32, chunk) == pytest.approx(stretch * DECODE_S, rel=0.02)


def test_many_waiting_prompts_get_more_than_few_readers() -> None:
    def chunk(num_decodes: int, num_prompts: int) -> int:
        pacing = Pacing(max_decode_stretch=2.0, min_chunk=16)
        return learn(pacing, num_decodes=num_decodes, num_prompts=num_prompts)

    alone = chunk(16, 1)
    assert chunk(16, 16) == alone
    assert step_time(16, chunk(16, 160)) == pytest.approx(20 * DECODE_S, rel=0.02)


def test_every_prompt_advances_on_a_device_that_can_afford_none() -> None:
    pacing = Pacing(max_decode_stretch=1.01, min_chunk=48)
    assert learn(pacing, num_decodes=4, num_prompts=1) == 48


def test_nothing_is_bounded_before_a_decoding_step_was_seen() -> None:
    pacing = Pacing(max_decode_stretch=2.0, min_chunk=16)
    assert pacing.budget(num_decodes=3, num_prompts=1) is None
    pacing.observe(num_decodes=0, num_prefill_tokens=100, seconds=1.0)
    assert pacing.budget(num_decodes=3, num_prompts=1) is None
    pacing.observe(num_decodes=3, num_prefill_tokens=0, seconds=0.1)
    # A tenth of a second more, at a hundredth of a second a token.
    assert pacing.budget(num_decodes=3, num_prompts=1) == pytest.approx(16, abs=6)


def test_a_short_rest_of_a_prompt_does_not_spoil_what_long_chunks_taught() -> None:
    pacing = Pacing(max_decode_stretch=2.0, min_chunk=16)
    before = learn(pacing, num_decodes=32, num_prompts=1)
    pacing.observe(num_decodes=32, num_prefill_tokens=1, seconds=step_time(32, 1))
    after = pacing.budget(num_decodes=32, num_prompts=1)
    assert after is not None and after > before * 0.8


def test_the_scheduler_cuts_a_long_prompt_only_while_others_decode() -> None:
    replica = Replica(full(), num_pages=400, max_num_tokens=256, max_batch_size=8)
    pacing = replica.scheduler.pacing = Pacing(max_decode_stretch=2.0, min_chunk=16)
    for number in range(4):
        replica.submit(f"reader{number}", [10 + number] * 5, 40)
    for _ in range(3):
        replica.step()
    pacing.observe(num_decodes=4, num_prefill_tokens=0, seconds=0.010)
    pacing.observe(num_decodes=4, num_prefill_tokens=50, seconds=0.020)
    replica.submit("long", list(range(100, 700)), 5)
    lengths = [span.len for _ in range(3) for span in replica.step().spans if span.len > 1]
    assert lengths == [50, 50, 50]
    replica.run()
    replica.check_outputs()
    replica.check_idle()
    replica.submit("alone", list(range(390, 990)), 5)
    assert [span.len for span in replica.step().spans] == [256]
    replica.run()
    replica.check_outputs()


@pytest.mark.parametrize("seed", range(6))
def test_outputs_do_not_depend_on_times(seed: int) -> None:
    rng = random.Random(seed)
    replica = Replica(full(), num_pages=60, max_num_tokens=64, max_batch_size=6, depth=rng.choice([1, 2]))
    pacing = replica.scheduler.pacing = Pacing(
        max_decode_stretch=rng.uniform(1.1, 5), min_chunk=rng.randint(1, 9)
    )
    for number in range(12):
        replica.submit(f"r{number}", [rng.randrange(2, 6) for _ in range(rng.randrange(1, 120))], 12)
        for _ in range(rng.randrange(4)):
            replica.step()
            num_decodes, num_tokens = rng.randrange(1, 7), rng.randrange(0, 40)
            pacing.observe(num_decodes=num_decodes, num_prefill_tokens=num_tokens, seconds=rng.random())
    replica.run()
    replica.check_outputs()
    replica.check_idle()
    assert replica.scheduler.stats.num_chunks > 12


@pytest.mark.parametrize("given", [1.0, 0, -3, float("nan"), 1001.0, "2"])
def test_a_wrong_stretch_is_refused(given: object) -> None:
    with pytest.raises(ConfigError, match="max_decode_stretch"):
        SchedulerConfig(max_decode_stretch=given)


def test_whole_prompts_cannot_be_paced() -> None:
    with pytest.raises(ConfigError, match=r"max_decode_stretch.*enable_chunked_prefill"):
        EngineConfig(
            model="x", enable_chunked_prefill=False, scheduler_config=SchedulerConfig(max_decode_stretch=2.0)
        )


EVEN = (64, 128, 192, 256, 384, 512, 768, 1024)


def bound_by_weights_first(tokens: int, context: int) -> float:
    """A device that reads weights for 5.6 ms anyway; attention costs more the longer the context is."""
    products_s = max(5.6e-3, 20e-6 * (32 + tokens))
    return products_s + 1.2e-3 + 1.5e-9 * tokens * (context + tokens / 2)


@pytest.mark.parametrize("even_chunks", [(), EVEN], ids=["any", "even"])
def test_a_long_prompt_never_stalls_readers_though_short_pieces_seem_free(
    even_chunks: tuple[int, ...],
) -> None:
    """Two steps outstanding: each chunk is planned before the one before it is seen."""
    pacing = Pacing(max_decode_stretch=2.0, min_chunk=64, even_chunks=even_chunks)
    decode_s = bound_by_weights_first(0, 0)
    pacing.observe(num_decodes=32, num_prefill_tokens=0, seconds=decode_s)
    chunks: list[int] = []
    times: list[float] = []
    while sum(chunks) < 32_000:
        chunk = pacing.budget(num_decodes=32, num_prompts=1) or 0
        times.append(bound_by_weights_first(chunk, sum(chunks)))
        chunks.append(chunk)
        if len(chunks) > 1:
            pacing.observe(num_decodes=32, num_prefill_tokens=chunks[-2], seconds=times[-2])
    # A step in a hundred may take a sixth more than it should, when the first chunk of its length runs.
    assert max(times) < 1.25 * 2.0 * decode_s
    assert sorted(times)[int(0.98 * len(times))] < 1.17 * 2.0 * decode_s
    # And time is not wasted: about what the stretch allows.
    assert sum(times) < 2.4 and max(chunks) >= 384 and chunks[:2] == [64, 64]
    assert not even_chunks or set(chunks) <= set(EVEN)


def test_what_became_dearer_counts_and_what_took_long_once_does_not() -> None:
    pacing = Pacing(max_decode_stretch=2.0, min_chunk=64)
    learn(pacing, num_decodes=32, num_prompts=1)
    before = pacing.budget(num_decodes=32, num_prompts=1) or 0
    for after in (before, 64):
        pacing.observe(num_decodes=32, num_prefill_tokens=before, seconds=DECODE_S + 4 * TOKEN_S * before)
        assert pacing.budget(num_decodes=32, num_prompts=1) == pytest.approx(after, rel=0.05)
    # It is long again once it is cheap again.
    assert learn(pacing, num_decodes=32, num_prompts=1, num_steps=40) == pytest.approx(before, rel=0.05)


def test_what_any_chunk_costs_is_not_laid_to_its_tokens() -> None:
    """64 tokens take 5 ms and 128 take 6: by the token these would be 10, more than the 6.5 to spare."""
    pacing = Pacing(max_decode_stretch=2.0, min_chunk=64, even_chunks=EVEN)
    pacing.observe(num_decodes=32, num_prefill_tokens=0, seconds=6.5e-3)
    chunks: list[int] = []
    for _ in range(120):
        chunks.append(pacing.budget(num_decodes=32, num_prompts=1) or 0)
        seconds = 6.5e-3 + 4e-3 + chunks[-1] * 1e-3 / 64
        pacing.observe(num_decodes=32, num_prefill_tokens=chunks[-1], seconds=seconds)
    # 192 would take 7: it is tried now and then, when what it costs is forgotten.
    assert chunks[-40:].count(128) >= 36 and set(chunks[-40:]) <= {128, 192}


def test_many_that_wait_for_few_are_not_kept_waiting_by_caution() -> None:
    pacing = Pacing(max_decode_stretch=2.0, min_chunk=64, even_chunks=EVEN)
    pacing.observe(num_decodes=8, num_prefill_tokens=0, seconds=DECODE_S)
    chunks: list[int] = []
    for _ in range(4):
        chunks.append(pacing.budget(num_decodes=8, num_prompts=200) or 0)
        pacing.observe(num_decodes=8, num_prefill_tokens=chunks[-1], seconds=step_time(8, chunks[-1]))
    assert chunks[:3] == [64, 512, 4096] and step_time(8, chunks[3]) == pytest.approx(50 * DECODE_S, rel=0.3)


def test_one_slow_step_does_not_freeze_long_chunks() -> None:
    """Of two chunks of about one length one took long: the slope between them is no cost of a token."""
    pacing = Pacing(max_decode_stretch=2.0, min_chunk=16)
    pacing.observe(num_decodes=32, num_prefill_tokens=0, seconds=step_time(32, 0))
    pacing.observe(num_decodes=1, num_prefill_tokens=1300, seconds=step_time(1, 1300))
    pacing.observe(num_decodes=1, num_prefill_tokens=1400, seconds=step_time(1, 1400) + 0.5)
    times: list[float] = []
    for _ in range(12):
        chunk = pacing.budget(num_decodes=32, num_prompts=1) or 0
        times.append(step_time(32, chunk))
        pacing.observe(num_decodes=32, num_prefill_tokens=chunk, seconds=times[-1])
    assert max(times) <= 2.1 * DECODE_S
    assert times[-1] >= 1.8 * DECODE_S
