"""The stand-in device: Triton's interpreter on a CPU, where it treats bfloat16 as a GPU does.

Triton (3.6 to 3.8 at least) interprets bfloat16 as its bits: products of matrices are those of unsigned integers, and a
conversion from float32 cuts bits off. :func:`mend` puts both right, in this process.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter


def is_stand_in() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def mend() -> None:
    """Let the interpreter multiply bfloat16 matrices and round to bfloat16; doing so again changes nothing."""
    builder = interpreter.InterpreterBuilder
    if builder.create_dot is not _dot:
        interpreter._convert_float, builder.create_dot = _convert, _dot


_their_convert, _their_dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot


def _convert(data: Any, source: Any, target: Any, rounding: Any) -> Any:
    if source is tl.float32 and target is tl.bfloat16:
        floats = torch.from_numpy(np.ascontiguousarray(data, dtype=np.float32))
        return floats.bfloat16().view(torch.int16).numpy().view(np.uint16)
    return _their_convert(data, source, target, rounding)


def _dot(self: Any, a: Any, b: Any, *others: Any) -> Any:
    return _their_dot(self, *map(_widened, (a, b)), *others)


def _widened(handle: Any) -> Any:
    if handle.dtype.scalar is not tl.bfloat16:
        return handle
    bits = np.ascontiguousarray(handle.data).view(np.int16)
    return interpreter.TensorHandle(torch.from_numpy(bits).view(torch.bfloat16).float().numpy(), tl.float32)
