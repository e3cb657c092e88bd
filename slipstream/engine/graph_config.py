"""What may a user say about captured steps? Names as in TensorRT-LLM."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from slipstream.core.errors import ConfigError
from slipstream.core.options import options

# Where nothing is said: every size while steps are short, then sizes whose padding costs little.
DEFAULT_SIZES = (1, 2, 3, 4, 6, 8, 12, *range(16, 65, 8), *range(80, 257, 16), *range(288, 513, 32))
MAX_SIZE = 4096
# Lengths of a lone prompt whose step is captured (`prompt_graphs.LENGTHS`).
NUM_PROMPT_LENGTHS = 9


@options()
class CudaGraphConfig:
    """Which decode steps are captured and replayed. A step whose size is not captured runs kernel by kernel.

    `batch_sizes` are the numbers of rows to capture, each when it is first met; `max_batch_size` bounds
    them. With `enable_padding` a step takes the next larger size, its unused rows idle; without, only steps
    of exactly these sizes are replayed. `enforce_eager=True` turns all of it off.
    """

    batch_sizes: Sequence[int] | None = None
    max_batch_size: int | None = None
    enable_padding: bool = True

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

    def sizes(self, max_batch_size: int) -> tuple[int, ...]:
        """Return the sizes to capture, ascending, for an engine that runs at most so many rows.

        The largest is what the bounds allow, so that with padding no step falls through.
        """
        bound = min(self.max_batch_size or MAX_SIZE, max_batch_size)
        if self.batch_sizes is not None:
            return tuple(sorted({size for size in self.batch_sizes if size <= bound}))
        bound = min(bound, DEFAULT_SIZES[-1])
        return (*(size for size in DEFAULT_SIZES if size < bound), bound)


def num_graphs(sizes: Sequence[int]) -> int:
    """Return how many steps may come to be captured: each size and short prompt, greedy and not."""
    return 2 * (len(sizes) + NUM_PROMPT_LENGTHS) if sizes else 0


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MAX_SIZE
