"""How the C library hands memory back, which decides half of what a network costs on a CPU.

A layer's output is megabytes. By default glibc returns such a block to the system when it is freed and takes it anew
for the next layer, and the system clears every page each time.
"""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # names of mallopt(3), as <malloc.h> numbers them
_KEPT = 1 << 30


def keep_memory() -> bool:
    """Let this process keep up to 1 GiB of freed memory for its next layers, instead of returning it to the system.

    Commands of `harmoq` and the recipes call it; a library must not change its host, so your own program has to::

        harmoq_ao.keep_memory()

    Where the process was started with ``MALLOC_TRIM_THRESHOLD_`` or ``MALLOC_MMAP_THRESHOLD_``, this wins. Blocks above
    1 GiB still go back at once.

    Returns:
        Whether the C library took it: glibc does; others, which decide for themselves, are left alone.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # musl has none
        return False
    return all(mallopt(name, _KEPT) for name in (_MMAP_THRESHOLD, _TRIM_THRESHOLD))
