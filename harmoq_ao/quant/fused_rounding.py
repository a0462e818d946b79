"""Arithmetic of the fake-quantizers fused by `torch.compile`, for the many steps of a refinement.

In plain torch a round trip and its gradient are some twenty passes over an operand; fused, they are one each. That pays
for attention maps, which no cache holds; smaller operands stay in plain torch, whose passes cost little there, while
each of their many shapes would have to be compiled. Values are the same bits on a CPU; the gradients of bounds, scales
and shifts are the same sums in another order.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import ParamSpec, TypeVar

import torch

from harmoq_ao.common.tracing import is_traced

P = ParamSpec("P")
T = TypeVar("T")

FUSED_FROM = 1 << 20
"""Smallest number of values for which a kernel of its own pays."""

_KERNELS = 256  # shapes and strides of operands, each compiled by itself
_on: ContextVar[bool] = ContextVar("harmoq_fused_rounding", default=False)


@contextmanager
def fused_rounding(enabled: bool = True) -> Iterator[None]:
    """Context manager in which fake-quantization of large operands that need gradients is compiled, once per shape.

    Where nothing can be compiled, the first such operand raises a warning and everything runs in plain torch.

    Args:
        enabled: False changes nothing.
    """
    token = _on.set(enabled)
    try:
        yield
    finally:
        _on.reset(token)


def is_fused(x: torch.Tensor) -> bool:
    """Whether `x` is large, the calling thread is inside :func:`fused_rounding`, and compilation works."""
    wanted = _on.get() and x.numel() >= FUSED_FROM and not is_traced()
    return wanted and can_compile(x.device.type)


@functools.cache
def compiled(function: Callable[P, T]) -> Callable[P, T]:
    """`function` compiled separately for every shape; one compiled function per process."""
    import torch._dynamo  # the compiler, only where it is used

    result: Callable[P, T] = torch.compile(function, dynamic=False)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        with torch._dynamo.config.patch(recompile_limit=_KERNELS):
            return result(*args, **kwargs)

    return call


@functools.cache
def can_compile(device_type: str) -> bool:
    """Whether compilation for that type of device works. Tried once per process; warns if not."""
    try:
        compiled(_probe)(torch.ones(64, device=device_type))
    except Exception as error:  # a missing compiler comes as one of many types
        reason = str(error).strip().splitlines()[0] or type(error).__name__
        warnings.warn(f"Fake-quantizers are not fused, steps take longer: {reason}", stacklevel=2)
        return False
    return True


def _probe(x: torch.Tensor) -> torch.Tensor:
    return (x * 0.5).round() + 1.0
