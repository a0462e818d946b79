"""Triton's interpreter, switched on for one test and off again.

Triton reads ``TRITON_INTERPRET`` when a function is decorated, so setting it would decide for a whole process and for
kernels that others compile. Here the decorated functions stay as they are, and calls of them are redirected.

Triton's interpreter keeps bfloat16 as the integers of its bits, which it multiplies as such, and loses the carry where
a significand is rounded up to the next power of two. Here it converts as torch does, and multiplies in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import triton.language as tl
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


_convert_float = interpreter._convert_float
_create_dot = interpreter.InterpreterBuilder.create_dot


def _convert(data: Any, source: Any, target: Any, rounding_mode: Any) -> Any:
    bits = np.ascontiguousarray(data)
    if source == tl.float32 and target == tl.bfloat16:
        bits = bits.view(np.uint32)
        # Half a unit of what stays, or just less where that is even already.
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    if source == tl.bfloat16 and target == tl.float32:
        return bits.view(np.uint16).astype(np.uint32) << 16
    return _convert_float(data, source, target, rounding_mode)


def _dot(builder: Any, a: Any, b: Any, acc: Any, *options: Any) -> Any:
    return _create_dot(builder, _as_float32(a), _as_float32(b), acc, *options)


def _as_float32(operand: Any) -> Any:
    if operand.dtype.scalar != tl.bfloat16:
        return operand
    data = _convert(operand.data, tl.bfloat16, tl.float32, None).view(np.float32)
    return interpreter.TensorHandle(data, tl.float32)


@contextmanager
def interpreted() -> Iterator[None]:
    """Run every Triton kernel launched inside, on CPU tensors, in the interpreter."""
    with (
        mock.patch.object(JITFunction, "run", _launch),
        mock.patch.object(JITFunction, "__call__", _call),
        mock.patch.object(interpreter, "_convert_float", _convert),
        mock.patch.object(interpreter.InterpreterBuilder, "create_dot", _dot),
    ):
        yield
