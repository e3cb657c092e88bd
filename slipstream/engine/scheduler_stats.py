"""What has a scheduler done so far?"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(slots=True)
class SchedulerStats:
    """Counters since the start; none of them can be derived from the output."""

    num_plans: int = 0
    num_admissions: int = 0
    num_preemptions: int = 0
    num_chunks: int = 0
    # Tokens of admitted requests, and how many of them the cache held.
    num_queried_tokens: int = 0
    num_cached_tokens: int = 0
    num_copied_blocks: int = 0
    num_parked: int = 0
    num_short_rows: int = 0
    num_rewound: int = 0
    num_planned_tokens: int = 0
    executed_tokens: int = 0
    max_outstanding: int = 0
    # Prompts that one step ran some of.
    max_prompts_per_step: int = 0
