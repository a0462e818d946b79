"""Arithmetic of the fake-quantizers fused by `torch.compile`, for the many steps of a refinement.

In plain torch a round trip and its gradient are some twenty passes over an operand; fused, they are one each. Values
are the same bits on a CPU; the gradients of bounds, scales and shifts are the same sums in another order.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")

_KERNELS = 256  # shapes and strides of operands, each compiled by itself
_on: ContextVar[bool] = ContextVar("harmoq_fused_rounding", default=False)


@contextmanager
def fused_rounding(device: torch.device, enabled: bool = True) -> Iterator[bool]:
    """Within, fake-quantization that gradients flow through is compiled, once for every shape.

    Where nothing can be compiled, a warning says so and everything is computed as without.

    Args:
        device: Where the operands are.
        enabled: False changes nothing.

    Yields:
        Whether it is compiled.
    """
    reason = None if not enabled else why_not(device.type)
    if reason is not None:
        warnings.warn(f"Fake-quantizers are not fused, steps take longer: {reason}", stacklevel=3)
    on = enabled and reason is None
    with ExitStack() as stack:
        if on:
            import torch._dynamo  # the compiler, only where it is used

            stack.enter_context(torch._dynamo.config.patch(recompile_limit=_KERNELS))
        token = _on.set(on)
        stack.callback(_on.reset, token)
        yield on


def is_fused() -> bool:
    """Whether the calling thread is within :func:`fused_rounding`, and it compiles."""
    return _on.get() and not torch.compiler.is_compiling()


@functools.cache
def compiled(function: Callable[P, T]) -> Callable[P, T]:
    """`function` compiled for every shape by itself, one compiled function a process."""
    result: Callable[P, T] = torch.compile(function, dynamic=False)
    return result


@functools.cache
def why_not(device_type: str) -> str | None:
    """Why nothing can be compiled on devices of that type, in one line; None if it can. Asked once a process."""
    try:
        compiled(_probe)(torch.ones(64, device=device_type))
    except Exception as error:  # a missing compiler comes as one of many types
        return str(error).strip().splitlines()[0] or type(error).__name__
    return None


def _probe(x: torch.Tensor) -> torch.Tensor:
    return (x * 0.5).round() + 1.0
