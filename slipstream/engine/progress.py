"""What does long work show? A bar on a terminal, nothing elsewhere unless asked for."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Generator

# A bar for a single prompt says nothing.
MIN_PROMPTS_SHOWN = 2


def _is_shown(asked: bool | None) -> bool:
    return sys.stderr.isatty() if asked is None else asked


@contextlib.contextmanager
def loading_bar(asked: bool | None) -> Generator[Callable[[str, float], None] | None]:
    """Yield a function (what, share done) that draws, or None where nothing is drawn."""
    if not _is_shown(asked):
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("opening", total=1.0)
        yield lambda what, share: bar.update(task, description=what, completed=share)


@contextlib.contextmanager
def generating_bar(num_prompts: int, asked: bool | None) -> Generator[Callable[[int], None]]:
    """Yield a function (new output tokens) to call after each prompt."""
    if not _is_shown(asked) or (asked is None and num_prompts < MIN_PROMPTS_SHOWN):
        yield lambda num_tokens: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("prompts"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[tokens]:,} tokens"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("prompts", total=num_prompts, tokens=0)
        done = 0

        def advance(num_tokens: int) -> None:
            nonlocal done
            done += num_tokens
            bar.update(task, advance=1, tokens=done)

        yield advance
