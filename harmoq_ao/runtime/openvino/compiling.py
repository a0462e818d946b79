"""Compilation by OpenVINO that leaves the thread's signal stack as it was.

The CPU plugin gives the thread that loads it an alternate signal stack, and each ``openvino.Core`` loads one of its
own. A plugin that goes puts back the stack it found; of two that go in the order they came, the second puts back one
that the first has unmapped. Python's signal handlers run on the alternate stack, so the next signal (Ctrl-C, a worker
that ended) then ends the process with SIGSEGV. A plugin that finds another stack than its own in use changes nothing.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import openvino

_DISABLED = 2  # SS_DISABLE of <signal.h>


class SignalStack(ctypes.Structure):
    """``stack_t`` of sigaltstack(2): where a thread's alternate signal stack begins, its flags, and its bytes."""

    _fields_ = (("start", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


def compile_on_cpu(model: openvino.Model | Path, **options: Any) -> openvino.CompiledModel:
    """Compile an OpenVINO model for the CPU.

    Args:
        model: Of one image size or of free sizes, or its file.
        options: Properties of the CPU plugin, such as ``INFERENCE_NUM_THREADS=2``.

    Raises:
        RuntimeError: The plugin does not take the model, or the file cannot be read.
    """
    import openvino as ov

    with signal_stack_kept():
        return ov.Core().compile_model(model, "CPU", options)


@contextmanager
def signal_stack_kept() -> Iterator[None]:
    """Put back the alternate signal stack of this thread at the end; nothing on systems other than Linux."""
    before = signal_stack()
    try:
        yield
    finally:
        # A plugin that may use AMX makes the kernel refuse stacks too small for its registers: then better none.
        if before is not None and _sigaltstack(before, None) != 0:
            _sigaltstack(SignalStack(None, _DISABLED, 0), None)


def signal_stack() -> SignalStack | None:
    """The alternate signal stack of this thread; None on systems other than Linux."""
    found = SignalStack()
    return found if sys.platform.startswith("linux") and _sigaltstack(None, found) == 0 else None


def _sigaltstack(new: SignalStack | None, old: SignalStack | None) -> int:
    """sigaltstack(2): 0 for success."""
    arguments = [None if one is None else ctypes.byref(one) for one in (new, old)]
    return int(ctypes.CDLL(None).sigaltstack(*arguments))
