"""When fused kernels run, and the exception by which they refuse a module."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from harmoq_ao.common import tracing
from harmoq_ao.kernels.select import preferred_family
from harmoq_ao.sites.quantized import QuantizedSite


class Misfit(Exception):  # noqa: N818 - an answer, not an error of the user
    """A module is not what a fused kernel computes; the message says why."""


_recognising: ContextVar[bool] = ContextVar("recognising", default=False)


@contextmanager
def recognising() -> Iterator[None]:
    """Context manager in which fused kernels are tried on every call but never run, on any device."""
    token = _recognising.set(True)
    try:
        yield
    finally:
        _recognising.reset(token)


def is_recognising() -> bool:
    """Whether :func:`recognising` is active."""
    return _recognising.get()


def is_traced() -> bool:
    """Whether torch records what runs instead of running it for its result: then every module is to be seen."""
    return tracing.is_traced() or torch.jit.is_tracing()  # type: ignore[attr-defined]


def runs_triton(site: nn.Module, operands: Sequence[Any]) -> bool:
    """Whether Triton kernels run a call: its tensors lie on a GPU, or the site was told to use them."""
    if not isinstance(site, QuantizedSite):
        return False
    on_gpu = any(isinstance(operand, Tensor) and operand.is_cuda for operand in operands)
    return preferred_family(torch.device("cuda" if on_gpu else "cpu"), site.backend) == "triton"
