"""Image tensors: validation, conversion of codes to floats, and luma."""

from __future__ import annotations

import torch

from harmoq_ao.common.errors import InputError

_LARGEST = {torch.uint8: 255, torch.uint16: 65535}
_LUMA = (0.299, 0.587, 0.114)


def check_image_tensor(
    x: object, channels: tuple[int, ...] = (1, 3), batched: bool | None = None, codes: bool = False
) -> None:
    """Raise unless a tensor is an image that a model may be given.

    Args:
        x: The value, which should be `[C, H, W]` or `[B, C, H, W]`, floating and finite.
        channels: The channel counts that are accepted.
        batched: Whether a batch dimension is required (``True``) or forbidden (``False``); ``None`` takes both.
        codes: Whether 8- and 16-bit codes (`torch.uint8`, `torch.uint16`) are accepted as well.

    Raises:
        InputError: It is not a tensor, has the wrong rank, channels or dtype, is empty, or holds NaN or infinity.
    """
    if not isinstance(x, torch.Tensor):
        raise InputError("This is not a tensor", found=type(x).__name__, expected="a torch.Tensor [B, C, H, W]")
    ranks = {None: (3, 4), True: (4,), False: (3,)}[batched]
    layout = " or ".join("[B, C, H, W]" if rank == 4 else "[C, H, W]" for rank in ranks)
    if x.ndim not in ranks:
        raise InputError(
            "The image tensor has the wrong rank",
            found=f"shape {list(x.shape)}",
            expected=layout,
            remedy="add a batch dimension with x[None], or take one image with x[0]",
        )
    if not x.is_floating_point() and not (codes and x.dtype in _LARGEST):
        raise InputError(
            "The image tensor has the wrong type",
            found=x.dtype,
            expected="a floating type with values in 0..1",
            remedy="convert 8-bit pixels with x.float() / 255",
        )
    if 0 in x.shape:
        raise InputError("The image tensor is empty", found=f"shape {list(x.shape)}", expected="no side of 0")
    if x.shape[-3] not in channels:
        raise InputError(
            "The image tensor has the wrong number of channels",
            found=f"{x.shape[-3]} (shape {list(x.shape)})",
            expected=f"{' or '.join(map(str, channels))}, in the layout {layout}",
            remedy="move the channels before height and width, and split off alpha",
        )
    if torch.compiler.is_compiling() or not x.is_floating_point():
        return  # values are unknown while compiling, and codes are always finite
    # The extremes are NaN or infinite where any value is. Testing each value takes several times the image's memory.
    if not torch.isfinite(torch.stack(torch.aminmax(x.detach()))).all():
        raise InputError(
            "The image tensor holds values that are not finite",
            found=f"{int((~torch.isfinite(x)).sum())} NaN or infinite values of {x.numel()}",
            expected="finite values in 0..1",
            remedy="check how the image was read or computed",
        )


def unit_floats(x: torch.Tensor) -> torch.Tensor:
    """Convert 8- or 16-bit codes to contiguous float32 in 0..1; floats are returned unchanged."""
    if x.is_floating_point():
        return x
    return x.to(torch.float32, memory_format=torch.contiguous_format).div_(_LARGEST[x.dtype])


def luma(crop: torch.Tensor) -> torch.Tensor:
    """BT.601 luma `[1, H, W]` of `[3, H, W]`, full range, for models of one channel."""
    red, green, blue = (weight * channel for weight, channel in zip(_LUMA, crop, strict=True))
    return (red + green + blue)[None]
