"""The progress bar of an optimisation: steps, time left, and its present loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from harmoq_ao.common.progress import is_shown, progress_bar


@contextmanager
def open_progress(title: str, steps: int, done: int, show: bool | None) -> Iterator[Callable[[int, str], None]]:
    """Context manager that opens a progress bar, on a terminal only.

    Yields a function that takes the number of steps done and a few words on the present state.

    Args:
        title: Text before the bar.
        steps: Number of all steps.
        done: Number of steps done already.
        show: Whether to show the bar; None shows it where standard error is a terminal.
    """
    if not is_shown(show):
        yield lambda done, words: None
        return
    with progress_bar() as bar:
        task = bar.add_task(title, total=steps, completed=done)
        yield lambda done, words: bar.update(task, completed=done, description=f"{title} ({words})")
