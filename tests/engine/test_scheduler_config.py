"""Are the scheduler's policies accepted by name or member, and passed on whole?"""

from __future__ import annotations

import pytest

from slipstream import CapacitySchedulerPolicy, ContextChunkingPolicy, SchedulerConfig
from slipstream.core.errors import ConfigError, UnsupportedError
from slipstream.engine.admission import POLICIES
from slipstream.engine.config import EngineConfig
from slipstream.engine.resolution import ModelFacts, ResolvedConfig, resolve

FACTS = ModelFacts(vocab_size=100, max_position_embeddings=64, dtype="float32")


def resolved(config: SchedulerConfig | None) -> ResolvedConfig:
    return resolve(EngineConfig(model="m", scheduler_config=config), FACTS, has_cuda=False)


@pytest.mark.parametrize("policy", CapacitySchedulerPolicy)
def test_capacity_policies_go_by_member_or_name(policy: CapacitySchedulerPolicy) -> None:
    for given in (policy, policy.value):
        assert resolved(SchedulerConfig(capacity_scheduler_policy=given)).capacity_policy == policy.value
    assert POLICIES.get(policy.value)


def test_the_default_policy_admits_what_fits_now() -> None:
    assert resolved(None).capacity_policy == resolved(SchedulerConfig()).capacity_policy == "MAX_UTILIZATION"


@pytest.mark.parametrize("given", ["MAX_UTILISATION", 3, None, ContextChunkingPolicy.EQUAL_PROGRESS])
def test_unknown_policies_are_refused_with_the_valid_ones(given: object) -> None:
    with pytest.raises(ConfigError, match="valid: MAX_UTILIZATION, GUARANTEED_NO_EVICT, STATIC_BATCH"):
        SchedulerConfig(capacity_scheduler_policy=given)


def test_the_chunking_policy_arrives() -> None:
    assert resolved(None).chunking_policy == "FIRST_COME_FIRST_SERVED"
    for given in (ContextChunkingPolicy.EQUAL_PROGRESS, "EQUAL_PROGRESS"):
        assert resolved(SchedulerConfig(context_chunking_policy=given)).chunking_policy == "EQUAL_PROGRESS"


def test_policies_of_a_later_version_are_refused_by_name() -> None:
    with pytest.raises(UnsupportedError, match="waiting_queue_policy"):
        SchedulerConfig(waiting_queue_policy="priority")
    with pytest.raises(UnsupportedError, match="dynamic_batch_config"):
        SchedulerConfig(dynamic_batch_config={})
