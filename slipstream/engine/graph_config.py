"""What may a user say about captured steps? Names as in TensorRT-LLM."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from slipstream.core.errors import ConfigError
from slipstream.core.options import options

# Where nothing is said: every size while steps are short, then sizes whose padding costs little. Beyond
# them an 8B model computes for as long as the host launches kernels.
DEFAULT_SIZES = (
    1, 2, 3, 4, 6, 8, 12,
    *range(16, 65, 8), *range(80, 257, 16), *range(288, 513, 32), *range(576, 1025, 64),
)  # fmt: skip
MAX_SIZE = 4096
MAX_BUDGET_S = 600.0


@options()
class CudaGraphConfig:
    """Which steps are captured and replayed. A step that no captured one can hold runs kernel by kernel.

    `batch_sizes` are the numbers of decoding rows to capture; `max_batch_size` bounds them. With
    `enable_padding` a step takes the next larger size, its unused rows idle, and steps with pieces of prompts
    are captured too. Then capturing is done before the engine is ready, the most useful steps first, for at
    most `capture_budget_s` seconds beside compiling; the others are captured while no request runs, or once
    running without them has cost as much as capturing them. Without padding only steps of exactly these sizes
    are replayed, and each is captured when it is first met. A lone prompt's step is captured either way.
    `enforce_eager=True` turns all of it off.
    """

    batch_sizes: Sequence[int] | None = None
    max_batch_size: int | None = None
    enable_padding: bool = True
    capture_budget_s: float = 4.0

    def __post_init__(self) -> None:
        sizes = self.batch_sizes
        if sizes is not None and (isinstance(sizes, str) or not sizes or not all(map(_is_size, sizes))):
            raise ConfigError(
                f"CudaGraphConfig(batch_sizes={sizes!r}) must be at least one whole number from 1 to "
                f"{MAX_SIZE}; leave it unset for the default, or use enforce_eager=True for none."
            )
        if self.max_batch_size is not None and not _is_size(self.max_batch_size):
            raise ConfigError(
                f"CudaGraphConfig(max_batch_size={self.max_batch_size!r}) must be a whole number from 1 to "
                f"{MAX_SIZE}."
            )
        if not isinstance(cast(Any, self.enable_padding), bool):
            raise ConfigError(
                f"CudaGraphConfig(enable_padding={self.enable_padding!r}) must be True or False."
            )
        if not _is_budget(self.capture_budget_s):
            raise ConfigError(
                f"CudaGraphConfig(capture_budget_s={self.capture_budget_s!r}) must be a number of seconds "
                f"from 0 (capture nothing before requests come) to {MAX_BUDGET_S:g}."
            )

    def sizes(self, max_batch_size: int) -> tuple[int, ...]:
        """Return the sizes to capture, ascending, for an engine that runs at most so many rows.

        The largest is what the bounds allow, so that with padding no step falls through.
        """
        bound = min(self.max_batch_size or MAX_SIZE, max_batch_size)
        if self.batch_sizes is not None:
            return tuple(sorted({size for size in self.batch_sizes if size <= bound}))
        bound = min(bound, DEFAULT_SIZES[-1])
        return (*(size for size in DEFAULT_SIZES if size < bound), bound)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MAX_SIZE


def _is_budget(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= MAX_BUDGET_S
