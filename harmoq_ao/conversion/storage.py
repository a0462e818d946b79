"""Which float type a saved model stores a tensor in, and rounding to it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from harmoq_ao.config import StorageDtype

_FLOAT16_MAX = 65504.0


def round_float_state(model: nn.Module, storage: StorageDtype) -> None:
    """Round every float parameter of `model` in place to what is stored; buffers are stored exactly and stay."""
    stored = rounding(storage)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point() and parameter.device.type != "meta":
                parameter.copy_(stored(parameter))


def rounding(storage: StorageDtype) -> Callable[[Tensor], Tensor]:
    """A function that rounds a float tensor to what is stored, in its own type."""

    def stored(tensor: Tensor) -> Tensor:
        dtype = storage_dtype(tensor, storage)
        return tensor.to(dtype).to(tensor.dtype)

    return stored


def storage_dtype(tensor: Tensor, storage: StorageDtype) -> torch.dtype:
    """Type a float tensor is stored in: as configured; ``auto`` is float16 unless that would overflow."""
    if storage != "auto":
        dtype: torch.dtype = getattr(torch, storage)
        return dtype
    largest = float(tensor.detach().abs().max()) if tensor.numel() else 0.0
    return torch.float16 if largest <= _FLOAT16_MAX else torch.bfloat16
