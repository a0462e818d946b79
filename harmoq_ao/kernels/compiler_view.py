"""What `torch.compile` sees of a quantized model on a CPU.

Rounding an input to codes is shown as plain torch, which the compiler fuses with whatever computed that input (a
LayerNorm, a GELU) into one pass. The contraction, and float attention in blocks of windows, are opaque operators of our
own. A plain `torch.export` is not concerned: there a linear is one operator (`ops.py`), and attention is torch's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from harmoq_ao.kernels import ops
from harmoq_ao.kernels.onednn import PackedLinear
from harmoq_ao.kernels.select import Backend
from harmoq_ao.quant import integer_reference

_shown: ContextVar[bool] = ContextVar("shown", default=False)


@contextmanager
def for_compiler() -> Iterator[None]:
    """Context manager in which an export sees what `torch.compile` sees: for graphs that are compiled afterwards."""
    token = _shown.set(True)
    try:
        yield
    finally:
        _shown.reset(token)


def is_compiled(x: Tensor) -> bool:
    """Whether a call on a CPU is being traced by `torch.compile`, or by an export that will be compiled."""
    return x.device.type == "cpu" and (torch.compiler.is_dynamo_compiling() or _shown.get())


def linear(
    x: Tensor,
    tensors: ops.LinearTensors,
    numbers: tuple[int, int, float],
    backend: Backend,
    ready: PackedLinear | None,
) -> Tensor:
    """Quantized ``F.linear`` for a traced graph: one operator, or rounding in plain torch and one operator.

    Args:
        x: `[..., K]` floating point.
        tensors: Of the site, as :func:`ops.linear` takes them.
        numbers: Bits of weights and activations, and the weights' shift, likewise.
        backend: The kernels that the user asked for.
        ready: The linear packed for CPUs, or None if it has not run yet.
    """
    # Only where the contraction of the codes is the whole result; and a compiled graph does not notice a NaN.
    if backend == "auto" and ready is not None and ready.only_codes and is_compiled(x):
        assert ready.reciprocal is not None  # a static range has one
        codes = integer_reference.quantize_codes(x, ready.reciprocal, ready.offset, ready.operands.act_bits)
        return ops.contract(codes, *tensors, *numbers, x.dtype)
    return ops.linear(x, *tensors, *numbers, backend)
