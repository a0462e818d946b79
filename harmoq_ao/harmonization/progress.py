"""The progress bar of an optimisation: steps, time left, and how it is doing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from harmoq_ao.common.progress import is_shown, progress_bar


@contextmanager
def open_progress(title: str, steps: int, done: int, show: bool | None) -> Iterator[Callable[[int, str], None]]:
    """A function that takes the steps done and a few words, shown on a terminal and silent elsewhere.

    Args:
        title: Text before the bar.
        steps: All steps.
        done: Steps done already.
        show: Whether to show the bar; None shows it where standard error is a terminal.
    """
    if not is_shown(show):
        yield lambda done, words: None
        return
    with progress_bar() as bar:
        task = bar.add_task(title, total=steps, completed=done)
        yield lambda done, words: bar.update(task, completed=done, description=f"{title} ({words})")
