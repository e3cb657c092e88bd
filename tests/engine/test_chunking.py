"""Is a step shared among prompts as its policy says? Chunks are counted, not timed."""

from __future__ import annotations

from typing import Any

import pytest
from fake_runner import Replica, full

from slipstream.core.errors import ConfigError
from slipstream.engine.chunking import POLICIES

EQUAL, FIRST = "EQUAL_PROGRESS", "FIRST_COME_FIRST_SERVED"


def make(policy: str, **options: Any) -> Replica:
    fields = {"num_pages": 200, "max_num_tokens": 32, "max_batch_size": 8} | options
    return Replica(full(), chunking_policy=policy, **fields)


def prompt(number: int, length: int) -> list[int]:
    return [100 * number + i for i in range(length)]


def chunks(replica: Replica, num_steps: int) -> list[dict[str, int]]:
    """Run some steps; returns the prompt tokens that each ran of every request."""
    found: list[dict[str, int]] = []
    for _ in range(num_steps):
        plan = replica.step()
        rows = {number: row.key[0] for number, row in replica.runner.rows.items()}
        spans = plan.spans if plan else []
        found.append({rows[span.row]: span.len for span in spans if span.row in rows})
    return found


def finish(replica: Replica) -> None:
    replica.run()
    replica.check_outputs()
    replica.check_idle()


def test_equal_progress_advances_all_prompts_at_once() -> None:
    replica = make(EQUAL)
    for i in range(4):
        replica.submit(f"r{i}", prompt(i, 60), 2)
    assert chunks(replica, 3) == [{f"r{i}": 8 for i in range(4)}] * 3
    assert replica.scheduler.stats.max_prompts_per_step == 4
    finish(replica)


def test_first_come_first_served_ends_the_oldest_first() -> None:
    replica = make(FIRST)
    for i in range(4):
        replica.submit(f"r{i}", prompt(i, 64), 2)
    assert chunks(replica, 2) == [{"r0": 32}, {"r0": 32}]
    assert replica.scheduler.stats.max_prompts_per_step == 1
    finish(replica)


def test_a_short_prompt_does_not_wait_behind_a_long_one() -> None:
    first_tokens: dict[str, int] = {}
    for policy in (FIRST, EQUAL):
        replica = make(policy)
        replica.submit("long", prompt(0, 500), 2)
        replica.submit("short", prompt(1, 10), 2)
        first_tokens[policy] = replica.run(until=lambda replica=replica: bool(replica.outputs["short", 0]))
        finish(replica)
    # 500 tokens take 16 steps of 32; beside half a step's share for the long one, ten fit into the first.
    assert first_tokens == {FIRST: 16, EQUAL: 1}


def test_what_a_short_prompt_leaves_is_shared_by_the_others() -> None:
    replica = make(EQUAL)
    for i, length in enumerate((100, 12, 100)):
        replica.submit(f"r{i}", prompt(i, length), 1)
    assert chunks(replica, 1) == [{"r0": 11, "r1": 11, "r2": 10}]
    # One token of the short prompt is left; the long ones share 31.
    assert chunks(replica, 1) == [{"r0": 16, "r1": 1, "r2": 15}]
    finish(replica)


def test_who_cannot_be_admitted_gets_no_share() -> None:
    replica = make(EQUAL, max_batch_size=2)
    for i in range(6):
        replica.submit(f"r{i}", prompt(i, 64), 1)
    assert chunks(replica, 2) == [{"r0": 16, "r1": 16}] * 2
    finish(replica)


def test_no_more_than_a_step_with_more_prompts_than_tokens() -> None:
    replica = make(EQUAL, max_num_tokens=5, max_batch_size=5)
    for i in range(9):
        replica.submit(f"r{i}", prompt(i, 7 + i), 3)
    finish(replica)
    assert replica.scheduler.stats.max_prompts_per_step == 5


def test_unknown_policies_are_named() -> None:
    with pytest.raises(ConfigError, match=EQUAL):
        POLICIES.get("EQUAL_PROGRES")
