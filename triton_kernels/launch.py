"""Compiler options, block sizes, devices and argument checks that the launchers share."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
from torch import Tensor

from harmoq_ao.common.errors import KernelError

OPTIONS = {"enable_fp_fusion": False}
"""Codes need a multiplication and an addition that are rounded separately."""

GELU_KINDS = ("none", "erf", "tanh")
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
"""Types that kernels read and write."""

MAX_CHANNELS = 256
"""Most input and output channels of a fused kernel: one program holds whole rows of both."""

MIN_CAPABILITY = (8, 0)
"""Oldest CUDA GPUs whose tensor cores Triton uses for int8."""


@cache
def supported(device: torch.device) -> bool:
    """Whether the kernels run on a device: AMD's GPUs, and NVIDIA's from capability 8.0 on.

    A machine without GPUs answers for the one that a report or a trace is about.
    """
    if device.type != "cuda":
        return False
    if torch.version.hip is not None or not torch.cuda.is_available():
        return True
    return torch.cuda.get_device_capability(device) >= MIN_CAPABILITY


def on_device(x: Tensor) -> AbstractContextManager[object]:
    """Context manager in which a launch goes to the GPU that holds ``x``, whichever is current."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def power_of_two(value: int, least: int = 1) -> int:
    """The smallest power of two that is at least ``value`` and ``least``."""
    return max(1 << max(value - 1, 0).bit_length(), least)


def precision(dtype: torch.dtype) -> str:
    """How float32 is multiplied: three products in TF32 on NVIDIA; of other types and GPUs there is but one way."""
    return "tf32x3" if dtype == torch.float32 and torch.version.hip is None else "ieee"


def blocks(length: int, block: int) -> int:
    """Blocks of ``block`` that cover ``length``."""
    return -(-length // block)


def check_matrix(x: Tensor, columns: int, name: str, dtypes: tuple[torch.dtype, ...] | None = None) -> None:
    """Raise KernelError unless ``x`` is `[M, columns]`, with unit stride along the columns, of one of ``dtypes``."""
    right = x.is_floating_point() if dtypes is None else x.dtype in dtypes
    if x.dim() != 2 or x.shape[1] != columns or not right or (columns > 1 and x.stride(1) != 1):
        expected = "floating point" if dtypes is None else " or ".join(map(str, dtypes))
        raise KernelError(
            f"{name} does not fit the kernel",
            found=f"{x.dtype} {tuple(x.shape)} with strides {x.stride()}",
            expected=f"{expected} [M, {columns}], contiguous along the last axis",
        )


def check_vector(value: Tensor | None, length: int, name: str, dtype: torch.dtype = torch.float32) -> None:
    """Raise KernelError unless ``value`` is None or a contiguous `[length]` vector of ``dtype``."""
    if value is not None and (value.shape != (length,) or value.dtype != dtype or not value.is_contiguous()):
        raise KernelError(
            f"{name} does not fit the kernel",
            found=f"{value.dtype} {tuple(value.shape)}",
            expected=f"{dtype} {(length,)}, contiguous",
        )


def check_residual(residual: Tensor | None, rows: int, columns: int) -> None:
    """Raise KernelError unless ``residual`` is None or floats `[rows, columns]`."""
    if residual is not None:
        check_matrix(residual, columns, "The residual", FLOATS)
        if len(residual) != rows:
            raise KernelError("The residual has another number of rows", found=len(residual), expected=rows)


def check_bits(bits: int, name: str, allowed: tuple[int, ...] = (2, 3, 4, 5, 6, 7, 8)) -> None:
    """Raise KernelError unless ``bits`` is one of ``allowed``."""
    if bits not in allowed:
        raise KernelError(f"The kernel does not take this width of {name}", found=bits, expected=allowed)


def check_choice(value: str, allowed: tuple[str, ...], name: str) -> None:
    """Raise KernelError unless ``value`` is one of ``allowed``."""
    if value not in allowed:
        raise KernelError(f"Unknown {name}", found=repr(value), expected=", ".join(allowed))


__all__ = [
    "FLOATS",
    "GELU_KINDS",
    "MAX_CHANNELS",
    "MIN_CAPABILITY",
    "OPTIONS",
    "blocks",
    "check_bits",
    "check_choice",
    "check_matrix",
    "check_residual",
    "check_vector",
    "on_device",
    "power_of_two",
    "precision",
    "supported",
]
