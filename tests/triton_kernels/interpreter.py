"""Triton's interpreter, switched on for one test and off again.

Triton reads ``TRITON_INTERPRET`` when a function is decorated, so setting it would decide for a whole process and for
kernels that others compile. Here the decorated functions stay as they are, and calls of them are redirected.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from triton.runtime import interpreter
from triton.runtime.jit import JITFunction


def _launch(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
    return _interpreted(kernel).run(*args, grid=grid, warmup=warmup, **kwargs)


def _call(function: JITFunction, *args: Any, **kwargs: Any) -> Any:
    """A call from inside a kernel. Unlike Triton's own, it leaves the language as it found it."""
    scope = interpreter._patch_lang(function.fn)
    try:
        return _interpreted(function).rewrite()(*args, **kwargs)
    finally:
        scope.restore()


def _interpreted(function: JITFunction) -> interpreter.InterpretedFunction:
    return interpreter.InterpretedFunction(function.fn)


@contextmanager
def interpreted() -> Iterator[None]:
    """Run every Triton kernel launched inside, on CPU tensors, in the interpreter."""
    with mock.patch.object(JITFunction, "run", _launch), mock.patch.object(JITFunction, "__call__", _call):
        yield
