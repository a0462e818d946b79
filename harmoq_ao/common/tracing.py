"""Whether torch, or this project, records what runs instead of running it for its result."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

_recording: ContextVar[bool] = ContextVar("recording", default=False)


@contextmanager
def recording() -> Iterator[None]:
    """Context manager in which quantized sites show themselves as one operator each (`programs/record.py`)."""
    token = _recording.set(True)
    try:
        yield
    finally:
        _recording.reset(token)


def is_recording() -> bool:
    """Whether :func:`recording` is active."""
    return _recording.get()


def is_traced() -> bool:
    """Whether tensors may be stand-ins without values: in :func:`recording`, `torch.compile` and `torch.export`."""
    return _recording.get() or torch.compiler.is_compiling()


def storage_of(tensor: Tensor) -> int:
    """What tensors that share memory have in common; a recorder's stand-ins (`shape_only`) have none of their own."""
    return getattr(tensor, "shape_only", tensor).untyped_storage()._cdata
