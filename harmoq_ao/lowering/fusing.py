"""When fused kernels run, and the exception by which they refuse a module."""

from __future__ import annotations

import torch

from harmoq_ao.common import tracing


class Misfit(Exception):  # noqa: N818 - an answer, not an error of the user
    """A module is not what a fused kernel computes; the message says why."""


def is_traced() -> bool:
    """Whether torch records what runs instead of running it for its result: then every module is to be seen."""
    return tracing.is_traced() or torch.jit.is_tracing()  # type: ignore[attr-defined]
