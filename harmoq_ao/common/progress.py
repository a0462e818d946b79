"""Progress bars, shown on a terminal only."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sized
from typing import TYPE_CHECKING, TypeVar

from harmoq_ao.common.distributed import is_first

if TYPE_CHECKING:
    from rich.progress import Progress

T = TypeVar("T")


def track(items: Iterable[T], description: str, *, total: int | None = None, show: bool | None = None) -> Iterator[T]:
    """Yield `items` under a progress bar on standard error.

    Args:
        items: The items to iterate over.
        description: Text before the bar.
        total: Number of items, where they have no ``len``.
        show: Whether to show the bar; by default where standard error is a terminal.
    """
    if not is_shown(show):
        yield from items
        return
    if total is None and isinstance(items, Sized):
        total = len(items)
    with progress_bar() as progress:
        yield from progress.track(items, total=total, description=description)


def is_shown(show: bool | None) -> bool:
    """Whether a bar is shown: as requested, by default on a terminal; of several ranks on the first only."""
    return is_first() and (sys.stderr.isatty() if show is None else show)


def progress_bar() -> Progress:
    """The project's progress bar: description, bar, count, elapsed and remaining time, on standard error."""
    # Where no bar is shown, nobody needs rich.
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
