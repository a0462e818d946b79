"""What `torch.compile` sees of a quantized model on a CPU, so that it fuses what it can and leaves the rest to us.

Quantizing an input is plain torch, which the compiler joins with whatever made that input (a LayerNorm, a GELU) into
one pass. The contraction, and float attention in blocks of windows, are operators of our own that it calls as they are.
`torch.export` by itself has no part in this: there a linear is one operator (`ops.py`), and attention is torch's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from harmoq_ao.kernels import ops
from harmoq_ao.kernels.linear import LinearKernel
from harmoq_ao.kernels.onednn import PackedLinear
from harmoq_ao.quant import integer_reference

_shown: ContextVar[bool] = ContextVar("shown", default=False)


@contextmanager
def for_compiler() -> Iterator[None]:
    """Within, an export sees what `torch.compile` sees: for graphs that it is going to compile."""
    token = _shown.set(True)
    try:
        yield
    finally:
        _shown.reset(token)


def is_compiled(x: Tensor) -> bool:
    """Whether a call on a CPU is traced by `torch.compile`, or for it."""
    return x.device.type == "cpu" and (torch.compiler.is_dynamo_compiling() or _shown.get())


def takes(packed: PackedLinear | None) -> bool:
    """Whether a linear can be shown in two steps; None is one that has not run yet."""
    return packed is not None and packed.only_codes


def linear(x: Tensor, kernel: LinearKernel, tensors: ops.LinearTensors, numbers: tuple[int, int, float]) -> Tensor:
    """Quantized ``F.linear``, as :func:`linear`, but that a NaN is not noticed.

    Args:
        x: `[..., K]` float32 or bfloat16.
        kernel: One that :func:`takes`.
        tensors: Of the site, as :func:`linear` has them.
        numbers: Bits of weights and activations, and the weights' shift, likewise.
    """
    packed = kernel.packed_onednn()
    assert packed.reciprocal is not None  # static bounds have one
    codes = integer_reference.quantize_codes(x, packed.reciprocal, packed.offset, packed.operands.act_bits)
    return ops.contract(codes, *tensors, *numbers, x.dtype)
