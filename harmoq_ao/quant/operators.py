"""C++ operators in place of this room's formulas, where a caller has put them: this room itself builds and loads none.

The formulas in torch stay the reference: values are the same bit for bit, sums over them within float32 rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import ModuleType

import torch
from torch import Tensor

_in_use: ContextVar[ModuleType | None] = ContextVar("harmoq_quant_operators", default=None)


@contextmanager
def using(operators: ModuleType | None) -> Iterator[None]:
    """Context manager in which this thread's float32 tensors on a CPU are rounded by C++ operators.

    Args:
        operators: What :func:`harmoq_ao.cpu_kernels.library.kernels` returns; None for plain torch.
    """
    token = _in_use.set(operators)
    try:
        yield
    finally:
        _in_use.reset(token)


def operators_for(*tensors: Tensor | None) -> ModuleType | None:
    """The operators in use, if all of the tensors are float32 on a CPU; else None."""
    operators = _in_use.get()
    if operators is None or any(t is not None and (t.dtype != torch.float32 or not t.is_cpu) for t in tensors):
        return None
    return operators
