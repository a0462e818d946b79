"""Tuning of glibc's allocator, which accounts for half the run time of a network on a CPU.

The output of a layer takes megabytes. By default glibc returns such a block to the system when it is freed and requests
it again for the next layer, and the system clears every page each time.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # parameters of mallopt(3), numbered as in <malloc.h>
_KEPT = 1 << 30
_LARGE = 1 << 20
_tuned = Event()  # set once `keep_memory` took effect in this process


def keep_memory() -> bool:
    """Let this process keep up to 1 GiB of freed memory for its next layers, instead of returning it to the system.

    The commands of `harmoq` and the recipes call it. A library must not change its host process, so programs call it
    themselves::

        harmoq_ao.keep_memory()

    It overrides ``MALLOC_TRIM_THRESHOLD_`` and ``MALLOC_MMAP_THRESHOLD_`` of the environment. Blocks above 1 GiB are
    still returned at once.

    Returns:
        Whether the C library supports it: glibc does; others are left unchanged.
    """
    mallopt = _of_glibc("mallopt")
    tuned = mallopt is not None and all(mallopt(name, _KEPT) for name in (_MMAP_THRESHOLD, _TRIM_THRESHOLD))
    if tuned:
        _tuned.set()
    return tuned


@contextmanager
def large_blocks_returned() -> Iterator[None]:
    """Context manager in which freed blocks of 1 MiB and more are returned to the system, in spite of `keep_memory`.

    For rare work that takes many large blocks for a while, such as the masks of all windows of an image: kept, they
    would lie scattered between what stays, where the next ones do not fit.
    """
    mallopt = _of_glibc("mallopt") if _tuned.is_set() else None
    if mallopt is None:
        yield
        return
    mallopt(_MMAP_THRESHOLD, _LARGE)
    try:
        yield
    finally:
        mallopt(_MMAP_THRESHOLD, _KEPT)


def return_freed_memory() -> bool:
    """Return freed memory to the system, wherever in the heap it lies; it is cleared when it is needed again.

    For after work that is rare and takes a lot in small pieces, which otherwise stay scattered between what is in use.

    Returns:
        Whether there was any: only glibc says so.
    """
    trim = _of_glibc("malloc_trim")
    return trim is not None and bool(trim(0))


def _of_glibc(name: str) -> Callable[..., int] | None:
    """A function of glibc, or None where another C library is in use."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        found: Callable[..., int] = getattr(ctypes.CDLL(None), name)
    except (OSError, AttributeError):  # musl has neither
        return None
    return found
