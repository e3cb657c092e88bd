"""Which kernel do a GPU's prompts attend by? Hopper's own where it can, else the one for any GPU.

Invariant: a pure function of what is known before anything runs; the reason is said when an engine starts.
"""

from __future__ import annotations

HOPPER_SM = 90
HOPPER_HEAD_DIMS = (64, 128, 256)
HOPPER_DTYPES = ("bfloat16", "float16")
# Lines that one look-up in the page table serves.
LINES_OF_LOOKUP = 8


def hopper_obstacle(*, sm: int, dtype: str, head_dim: int, block_tokens: int) -> str:
    """Return why Hopper's own kernel cannot run a layer, "" where it can.

    `sm` is the compute capability x 10, `dtype` that of queries, keys and values alike.
    """
    if sm != HOPPER_SM:
        return f"it is for compute capability 9.0, and this GPU has {sm // 10}.{sm % 10}"
    if dtype not in HOPPER_DTYPES:
        return f"it serves {' and '.join(HOPPER_DTYPES)}, not {dtype}"
    if head_dim not in HOPPER_HEAD_DIMS:
        return f"it serves heads of {', '.join(map(str, HOPPER_HEAD_DIMS))}, not of {head_dim}"
    if block_tokens % LINES_OF_LOOKUP:
        return f"it serves blocks of a multiple of {LINES_OF_LOOKUP} tokens, not of {block_tokens}"
    return ""


def describe_prompt_kernel(*, sm: int, dtype: str, head_dim: int, block_tokens: int) -> str:
    """Return a sentence for an engine's report."""
    obstacle = hopper_obstacle(sm=sm, dtype=dtype, head_dim=head_dim, block_tokens=block_tokens)
    if not obstacle:
        return "prompts attend by Hopper's own kernel, few queries by the general one"
    return f"prompts attend by the general kernel: Hopper's own was passed over, {obstacle}"
